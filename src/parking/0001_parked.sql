-- Changes that wait: refused by a target or a rule, or behind such a one with a key in common.
-- `offset` is the place in the journal; the change itself is here, because the journal may go.
CREATE TABLE parked (
    sink       TEXT NOT NULL,
    offset     INTEGER NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('parked', 'dead')),
    room       BLOB NOT NULL,               -- 8 bytes: the table, or the prefix of messages
    keys       BLOB NOT NULL,               -- 16 bytes each (src/change/key.rs); empty: all of the table
    table_name TEXT,
    op         TEXT NOT NULL,
    bytes      INTEGER NOT NULL,
    change     TEXT NOT NULL,               -- as src/parking/stored.rs writes it
    attempts   INTEGER NOT NULL,            -- 0: it waits behind another
    error      TEXT NOT NULL,
    first_at   INTEGER NOT NULL,            -- microseconds since 1970
    last_at    INTEGER NOT NULL,
    next_at    INTEGER NOT NULL,
    retry_seq  INTEGER,                     -- a retry that was sent and whose outcome is open
    superseded INTEGER,                     -- the offset of a later change of its key, delivered
    edited_by  TEXT,
    PRIMARY KEY (sink, offset)
) STRICT;
