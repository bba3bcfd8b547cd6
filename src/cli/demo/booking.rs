//! The booking desk of a cruise line: its tables, and a believable day of work on them.
//!
//! Every statement returns the rows that it changed, so what is counted is what the server says,
//! and only once it has acknowledged the commit.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use fastrand::Rng;

use super::{cluster, tally::Counts};
use crate::{
    error::{Error, Result, ResultExt},
    source::postgres::Session,
};

/// The tables, each with its key.
pub(super) const TABLES: [(&str, &[&str]); 5] = [
    ("bookings", &["booking_id"]),
    ("cabin_inventory", &["sailing_id", "cabin_id"]),
    ("guests", &["guest_id"]),
    ("payments", &["payment_id"]),
    ("sailings", &["sailing_id"]),
];

/// `briefing` is long enough for PostgreSQL to store it out of line (TOAST). Tables with the
/// replica identity `full` show what an update has changed.
const SCHEMA: &str = "
create table guests (
    guest_id bigint generated always as identity primary key,
    name text not null,
    email text not null,
    loyalty text not null default 'none'
);
create table sailings (
    sailing_id date primary key,
    ship text not null,
    departs_at timestamptz not null,
    briefing text not null
);
create table cabin_inventory (
    sailing_id date not null references sailings,
    cabin_id text not null,
    deck smallint not null,
    price_cents bigint not null,
    reserved boolean not null default false,
    held_until timestamptz(3),
    primary key (sailing_id, cabin_id)
);
create table bookings (
    booking_id bigint generated always as identity (start with 8841) primary key,
    guest_id bigint not null references guests,
    sailing_id date not null,
    cabin_id text not null,
    status text not null default 'pending',
    party jsonb not null,
    extras text[] not null default '{}',
    notes text,
    created_at timestamptz(3) not null default now(),
    confirmed_at timestamptz(3),
    foreign key (sailing_id, cabin_id) references cabin_inventory
);
create table payments (
    payment_id bigint generated always as identity primary key,
    booking_id bigint not null references bookings,
    amount_cents bigint not null,
    status text not null,
    fee_percent numeric(5, 2) not null default 1.90,
    paid_at timestamptz(3) not null default now()
);
create index on payments (booking_id);
alter table bookings replica identity full;
alter table cabin_inventory replica identity full;
alter table payments replica identity full;
";

const FIRST_NAMES: [&str; 12] = [
    "Amara", "Björn", "Chiara", "Dara", "Elif", "Felix", "Grace", "Hiro", "Inés", "Jonas", "Zoë",
    "Yusuf",
];
const LAST_NAMES: [&str; 10] = [
    "O'Brien", "Núñez", "Svensson", "Okafor", "Tanaka", "Rossi", "Weber", "Kaya", "Dubois", "Smith",
];
const SHIPS: [&str; 4] = ["Harbor Star", "Northern Light", "Meridian", "Santa Clara"];
const EXTRAS: [&str; 5] = ["wifi", "excursion", "spa", "late dinner", "balcony"];
const NOTES: [&str; 4] =
    ["anniversary", "needs a cot", "vegetarian, \"no nuts\"", "arrives late\nfrom Oslo"];

const SAILINGS: u32 = 12;
const CABINS: u32 = 60;
const GUESTS_FIRST: usize = 40;

/// Creates the tables, empty.
pub(super) fn create(url: &str) -> Result<()> {
    let mut session = cluster::connect(url)?;
    session.execute(SCHEMA).context(|| "while creating the tables of the demo")?;
    Ok(())
}

/// What must not be seen by anybody: transaction ids and keys that were rolled back.
#[derive(Clone, Debug, Default)]
pub(super) struct Undone {
    /// The ids of rolled back transactions, as 32 bits.
    pub(super) transactions: BTreeSet<u32>,
    /// `payment_id` of rows that were inserted after a savepoint and undone with it.
    pub(super) payments: BTreeSet<i64>,
}

#[derive(Clone, Debug)]
struct Booking {
    id: String,
    sailing: String,
    cabin: String,
}

impl Booking {
    /// The condition that names its cabin.
    fn cabin_is(&self) -> String {
        format!("sailing_id = '{}' and cabin_id = '{}'", self.sailing, self.cabin)
    }
}

/// What becomes of a cabin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cabin {
    Free,
    Held,
    Reserved,
}

/// One clerk with a session; remembers what there is to work on.
#[derive(Debug)]
pub(super) struct Desk {
    session: Session,
    counts: Arc<Counts>,
    rng: Rng,
    undone: Undone,
    guests: Vec<String>,
    free: Vec<(String, String)>,
    pending: Vec<Booking>,
    confirmed: Vec<Booking>,
}

impl Desk {
    /// Connects, and puts guests, sailings and cabins into the empty tables.
    pub(super) fn open(url: &str, counts: Arc<Counts>) -> Result<Self> {
        let mut desk = Self {
            session: cluster::connect(url)?,
            counts,
            rng: Rng::new(),
            undone: Undone::default(),
            guests: Vec::new(),
            free: Vec::new(),
            pending: Vec::new(),
            confirmed: Vec::new(),
        };
        desk.furnish().context(|| "while filling the tables of the demo")?;
        Ok(desk)
    }

    /// What was rolled back.
    pub(super) fn into_undone(self) -> Undone {
        self.undone
    }

    /// One transaction: what a desk does most is booking and confirming.
    pub(super) fn work(&mut self) -> Result<()> {
        let crowded = self.free.len() < 60;
        match self.rng.u8(0..100) {
            0..30 if !crowded => self.book(),
            30..34 if !crowded => self.change_of_mind(),
            34..64 => self.confirm(),
            64..72 => self.capture_payments(),
            72..84 => self.reprice(),
            84..86 => self.delay_sailing(),
            _ => self.cancel(),
        }
        .context(|| "in the load of the demo")
    }

    fn furnish(&mut self) -> Result<()> {
        let mut transaction = Transaction::begin(&mut self.session)?;
        transaction.run(&format!(
            "insert into sailings \
             select date '2026-07-03' + 7 * n, (array['{}'])[1 + n % {}], \
                    timestamptz '2026-07-03 17:00+00' + 7 * n * interval '1 day', \
                    (select string_agg(md5(n || '.' || i), ' ') from generate_series(1, 150) i) \
             from generate_series(0, {SAILINGS} - 1) n returning sailing_id",
            SHIPS.join("','"),
            SHIPS.len(),
        ))?;
        let cabins = transaction.run(&format!(
            "insert into cabin_inventory (sailing_id, cabin_id, deck, price_cents) \
             select sailing_id, chr(65 + n % 4) || 10 + n, 4 + n % 4, 90000 + 2500 * (n % 30) \
             from sailings, generate_series(0, {CABINS} - 1) n returning sailing_id, cabin_id"
        ))?;
        let names: Vec<String> = (0..GUESTS_FIRST).map(|_| guest(&mut self.rng)).collect();
        let guests = transaction.run(&insert_guests(&names))?;
        self.counts.filling.store(transaction.changes, Relaxed);
        transaction.commit(&self.counts)?;
        self.guests = guests.into_iter().filter_map(first).collect();
        self.free = cabins.into_iter().filter_map(pair).collect();
        Ok(())
    }

    /// Three tables: a new booking, its cabin, and now and then a new guest.
    fn book(&mut self) -> Result<()> {
        let Some((sailing, cabin)) = take(&mut self.rng, &mut self.free) else { return Ok(()) };
        let mut transaction = Transaction::begin(&mut self.session)?;
        if self.rng.u8(0..10) == 0 {
            let rows = transaction.run(&insert_guests(&[guest(&mut self.rng)]))?;
            self.guests.extend(rows.into_iter().filter_map(first));
        }
        let id = insert_booking(&mut transaction, &mut self.rng, (&self.guests, &sailing, &cabin))?;
        let booking = Booking { id, sailing, cabin };
        transaction.run(&assign(&booking, Cabin::Held))?;
        transaction.commit(&self.counts)?;
        self.pending.push(booking);
        Ok(())
    }

    /// Books, and rolls it all back: nobody may ever see a trace of it.
    fn change_of_mind(&mut self) -> Result<()> {
        let Some((sailing, cabin)) = take(&mut self.rng, &mut self.free) else { return Ok(()) };
        self.free.push((sailing.clone(), cabin.clone()));
        let mut transaction = Transaction::begin(&mut self.session)?;
        let id = insert_booking(&mut transaction, &mut self.rng, (&self.guests, &sailing, &cabin))?;
        let booking = Booking { id, sailing, cabin };
        transaction.run(&assign(&booking, Cabin::Held))?;
        let xid = transaction.roll_back(&self.counts)?;
        self.undone.transactions.insert(xid);
        Ok(())
    }

    /// The transaction of the issue: booking, payment and cabin at once. One card in eight is
    /// declined first, which undoes a part of the transaction by a savepoint.
    fn confirm(&mut self) -> Result<()> {
        let Some(booking) = take(&mut self.rng, &mut self.pending) else { return self.book() };
        let mut transaction = Transaction::begin(&mut self.session)?;
        transaction.run(&format!(
            "update bookings set status = 'confirmed', confirmed_at = now() \
             where booking_id = {} returning booking_id",
            booking.id
        ))?;
        let amount = 500 * self.rng.u32(180..900);
        let pay = format!(
            "insert into payments (booking_id, amount_cents, status) \
             values ({}, {amount}, 'authorized') returning payment_id",
            booking.id
        );
        if self.rng.u8(0..8) == 0 {
            let declined = transaction.run_and_undo(&pay, &self.counts)?;
            let ids = declined.into_iter().filter_map(first);
            self.undone.payments.extend(ids.filter_map(|id| id.parse::<i64>().ok()));
        }
        transaction.run(&pay)?;
        transaction.run(&assign(&booking, Cabin::Reserved))?;
        transaction.commit(&self.counts)?;
        self.confirmed.push(booking);
        Ok(())
    }

    /// One statement that changes several rows.
    fn capture_payments(&mut self) -> Result<()> {
        let mut transaction = Transaction::begin(&mut self.session)?;
        transaction.run(
            "update payments set status = 'captured' where payment_id in (select payment_id \
             from payments where status = 'authorized' order by payment_id limit 4) \
             returning payment_id",
        )?;
        transaction.commit(&self.counts)
    }

    /// A single update.
    fn reprice(&mut self) -> Result<()> {
        let Some((sailing, cabin)) = self.rng.choice(&self.free).cloned() else { return Ok(()) };
        let cents = self.rng.i32(-20..=30) * 100;
        let mut transaction = Transaction::begin(&mut self.session)?;
        transaction.run(&format!(
            "update cabin_inventory set price_cents = greatest(price_cents + {cents}, 50000) \
             where sailing_id = '{sailing}' and cabin_id = '{cabin}' returning cabin_id"
        ))?;
        transaction.commit(&self.counts)
    }

    /// An update that leaves a long value alone, which PostgreSQL then does not send.
    fn delay_sailing(&mut self) -> Result<()> {
        let (number, minutes) = (self.rng.u32(0..SAILINGS), self.rng.i32(-30..=60));
        let mut transaction = Transaction::begin(&mut self.session)?;
        transaction.run(&format!(
            "update sailings set departs_at = departs_at + {minutes} * interval '1 minute' \
             where sailing_id = date '2026-07-03' + 7 * {number} returning sailing_id"
        ))?;
        transaction.commit(&self.counts)
    }

    /// Deletes a booking with its payments, and frees the cabin.
    fn cancel(&mut self) -> Result<()> {
        let from_confirmed = self.rng.bool() || self.pending.is_empty();
        let bookings = if from_confirmed { &mut self.confirmed } else { &mut self.pending };
        let Some(booking) = take(&mut self.rng, bookings) else { return self.book() };
        let id = &booking.id;
        let mut transaction = Transaction::begin(&mut self.session)?;
        for table in ["payments", "bookings"] {
            transaction.run(&format!(
                "delete from {table} where booking_id = {id} returning booking_id"
            ))?;
        }
        transaction.run(&assign(&booking, Cabin::Free))?;
        transaction.commit(&self.counts)?;
        self.free.push((booking.sailing, booking.cabin));
        Ok(())
    }
}

/// An open transaction that counts the rows that the server says it has changed.
struct Transaction<'a> {
    session: &'a mut Session,
    changes: u64,
}

type TextRow = Vec<Option<String>>;

impl<'a> Transaction<'a> {
    fn begin(session: &'a mut Session) -> Result<Self> {
        session.execute("begin")?;
        Ok(Self { session, changes: 0 })
    }

    fn run(&mut self, sql: &str) -> Result<Vec<TextRow>> {
        let rows = self.session.execute(sql)?;
        self.changes += rows.len() as u64;
        Ok(rows)
    }

    /// Runs a statement and goes back to the savepoint before it.
    fn run_and_undo(&mut self, sql: &str, counts: &Counts) -> Result<Vec<TextRow>> {
        self.session.execute("savepoint payment")?;
        let rows = self.session.execute(sql)?;
        self.session.execute("rollback to savepoint payment")?;
        counts.savepoints.fetch_add(1, Relaxed);
        Ok(rows)
    }

    fn commit(self, counts: &Counts) -> Result<()> {
        self.session.execute("commit")?;
        counts.commit(self.changes);
        Ok(())
    }

    /// Undoes everything; the id of the transaction that never was.
    fn roll_back(self, counts: &Counts) -> Result<u32> {
        let id = self.session.execute("select pg_current_xact_id()::xid")?;
        self.session.execute("rollback")?;
        counts.rollbacks.fetch_add(1, Relaxed);
        let id = id.into_iter().next().and_then(first).and_then(|id| id.parse().ok());
        id.ok_or_else(|| Error::bug("the server has not told a transaction's id"))
    }
}

fn insert_guests(names: &[String]) -> String {
    let row = |name: &String| {
        let email: String = name.to_lowercase().chars().filter(char::is_ascii_alphabetic).collect();
        format!("({}, '{email}@example.com')", quote(name))
    };
    let rows: Vec<String> = names.iter().map(row).collect();
    format!("insert into guests (name, email) values {} returning guest_id", rows.join(", "))
}

fn insert_booking(
    transaction: &mut Transaction<'_>,
    rng: &mut Rng,
    (guests, sailing, cabin): (&[String], &str, &str),
) -> Result<String> {
    let guest = rng.choice(guests).map_or("1", String::as_str);
    let party = format!("{{\"adults\": {}, \"children\": {}}}", rng.u8(1..4), rng.u8(0..3));
    let extras: Vec<&str> = EXTRAS.into_iter().filter(|_| rng.u8(0..3) == 0).collect();
    let extras =
        if extras.is_empty() { String::new() } else { format!("'{}'", extras.join("','")) };
    let note = (rng.u8(0..4) == 0).then(|| rng.choice(NOTES)).flatten();
    let note = note.map_or("null".into(), quote);
    let rows = transaction.run(&format!(
        "insert into bookings (guest_id, sailing_id, cabin_id, party, extras, notes) values \
         ({guest}, '{sailing}', '{cabin}', '{party}', array[{extras}]::text[], {note}) \
         returning booking_id"
    ))?;
    let id = rows.into_iter().next().and_then(first);
    id.ok_or_else(|| Error::bug("the server has not returned the id of a new booking"))
}

fn assign(booking: &Booking, cabin: Cabin) -> String {
    let values = match cabin {
        Cabin::Free => "reserved = false, held_until = null",
        Cabin::Held => "held_until = now() + interval '20 minutes'",
        Cabin::Reserved => "reserved = true, held_until = null",
    };
    let cabin = booking.cabin_is();
    format!("update cabin_inventory set {values} where {cabin} returning cabin_id")
}

fn guest(rng: &mut Rng) -> String {
    let (first, last) = (rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES));
    format!("{} {}", first.unwrap_or_default(), last.unwrap_or_default())
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn first(row: TextRow) -> Option<String> {
    row.into_iter().next().flatten()
}

fn pair(row: TextRow) -> Option<(String, String)> {
    let mut values = row.into_iter().flatten();
    values.next().zip(values.next())
}

fn take<T>(rng: &mut Rng, items: &mut Vec<T>) -> Option<T> {
    (!items.is_empty()).then(|| items.swap_remove(rng.usize(0..items.len())))
}
