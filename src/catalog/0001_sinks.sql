-- Progress of each sink. It grows within an epoch; a rewind or a new creation begins another epoch.
CREATE TABLE sink (
    name       TEXT PRIMARY KEY,
    source     TEXT NOT NULL,
    lineage    TEXT NOT NULL,
    epoch      INTEGER NOT NULL,
    cursor     INTEGER NOT NULL,
    retry_seq  INTEGER NOT NULL DEFAULT 0,
    started    INTEGER NOT NULL DEFAULT 0,   -- 1 once something was delivered in this epoch
    created_at INTEGER NOT NULL,             -- microseconds since 1970
    updated_at INTEGER NOT NULL
) STRICT;

-- Ranges that the journal dropped before a sink had read them; closed by a backfill.
CREATE TABLE lost_range (
    id          INTEGER PRIMARY KEY,
    sink        TEXT NOT NULL REFERENCES sink (name),
    from_offset INTEGER NOT NULL,
    to_offset   INTEGER NOT NULL,
    reason      TEXT NOT NULL,
    at          INTEGER NOT NULL
) STRICT;

-- What was done to whom by whom, and why. Only ever added to.
CREATE TABLE event (
    id     INTEGER PRIMARY KEY,
    at     INTEGER NOT NULL,
    actor  TEXT NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
