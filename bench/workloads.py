"""The workloads: each fills the WAL behind a slot that was made before it."""

from dataclasses import dataclass

SMALL = """(id bigserial primary key, account_id int not null, amount numeric(12,2) not null,
    status text not null, note text not null, created_at timestamptz not null default now())"""

SMALL_ROW = """i % 10007, (i % 100000) / 100.0, 'pending',
    'booking ' || i || ' of the harbour office, second quay, by hand'"""

WIDE_COLUMNS = ", ".join(f"c{n} text not null" for n in range(39))
WIDE_ROW = ", ".join(f"'column {n} of ' || lpad(i::text, 9, '0')" for n in range(39))


@dataclass(frozen=True)
class Workload:
    """A name, what is there before the slot, and what is written after it."""

    name: str
    about: str
    before: str
    load: str
    changes: int


def in_transactions(count, size, statement):
    """A block that runs `statement` for the numbers lo to hi, `size` of them a transaction."""
    return f"""do $$ declare lo int; hi int; begin
        for t in 0..{count // size - 1} loop
            lo := t * {size} + 1; hi := lo + {size} - 1;
            {statement};
            commit;
        end loop; end $$;"""


def workloads(rows):
    """The four workloads, scaled to `rows` small rows."""
    rows = max(rows // 1000, 1) * 1000
    half = max(rows // 2000, 1) * 1000
    insert_small = ("insert into {0} (account_id, amount, status, note) "
                    f"select {SMALL_ROW} from generate_series(lo, hi) i")
    return [
        Workload("ins", "inserts of small rows in transactions of 1000",
                 f"create table ins {SMALL};",
                 in_transactions(rows, 1000, insert_small.format("ins")), rows),
        Workload("one", "one-row transactions",
                 f"create table one {SMALL};",
                 in_transactions(half, 1, insert_small.format("one")), half),
        Workload("upd", "updates with REPLICA IDENTITY FULL in transactions of 1000",
                 f"create table upd {SMALL}; alter table upd replica identity full;"
                 + in_transactions(half, 1000, insert_small.format("upd")),
                 in_transactions(half, 1000, "update upd set amount = amount + 1, "
                                 "status = 'confirmed' where id between lo and hi"), half),
        Workload("wide", "rows of 40 columns, about 1 KB, in transactions of 1000",
                 f"create table wide (id bigserial primary key, {WIDE_COLUMNS});",
                 in_transactions(half, 1000, "insert into wide select i, "
                                 f"{WIDE_ROW} from generate_series(lo, hi) i"), half),
    ]


@dataclass(frozen=True)
class Backlog:
    """A loaded workload: from its base slot to `end_lsn` lie `changes` and one marker row."""

    workload: Workload
    database: str
    end_lsn: str
    wal_bytes: int


def load(cluster, workload):
    """Creates a database for the workload, its base slot, and the backlog behind it."""
    database = f"bench_{workload.name}"
    cluster.sql(f"create database {database}")
    cluster.sql(workload.before, database, settings="-c synchronous_commit=off")
    cluster.sql("create table marker (id int primary key);"
                "create publication bench for all tables; vacuum analyze; checkpoint;", database)
    cluster.sql(f"select pg_create_logical_replication_slot('base_{workload.name}', 'pgoutput')",
                database)
    start = cluster.sql("select pg_current_wal_insert_lsn()", database)
    cluster.sql(workload.load, database, settings="-c synchronous_commit=off")
    # A row behind the end: a reader that stops at the first change past it decodes no more.
    end = cluster.sql("select pg_current_wal_insert_lsn()", database)
    cluster.sql("insert into marker values (1)", database)
    size = cluster.sql(f"select pg_wal_lsn_diff('{end}', '{start}')::bigint", database)
    return Backlog(workload, database, end, int(size))


def drop(cluster, backlog):
    """Removes the base slot and the database, and with them the WAL that they hold."""
    cluster.sql(f"select pg_drop_replication_slot('base_{backlog.workload.name}')")
    cluster.sql(f"drop database {backlog.database} with (force)")
    cluster.sql("checkpoint")
