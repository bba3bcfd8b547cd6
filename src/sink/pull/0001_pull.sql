-- The sink's progress: every change below the cursor is acknowledged, filtered or parked.
CREATE TABLE progress (
    id        INTEGER PRIMARY KEY CHECK (id = 1),
    lineage   TEXT NOT NULL,
    epoch     INTEGER NOT NULL,
    cursor    INTEGER NOT NULL,
    retry_seq INTEGER NOT NULL
) STRICT;

-- What is done beyond the cursor.
CREATE TABLE acked (
    from_offset INTEGER PRIMARY KEY,
    to_offset   INTEGER NOT NULL
) STRICT;

-- Messages that were delivered and wait for their acknowledgement.
CREATE TABLE lease (
    "offset"   INTEGER NOT NULL,
    part       INTEGER NOT NULL,             -- of an exploded change, else 0
    deliveries INTEGER NOT NULL,
    visible_at INTEGER NOT NULL,             -- microseconds since 1970; then others may have it
    acked      INTEGER NOT NULL,             -- 1: while other parts of its change are not
    PRIMARY KEY ("offset", part)
) STRICT, WITHOUT ROWID;

-- Messages that the journal's reader will not bring again: retries of parked changes.
CREATE TABLE kept (
    "offset" INTEGER NOT NULL,
    part     INTEGER NOT NULL,
    room     INTEGER,                        -- what it keeps its order with; null: nothing
    keys     BLOB NOT NULL,                  -- 16 bytes each
    body     BLOB NOT NULL,
    PRIMARY KEY ("offset", part)
) STRICT;
