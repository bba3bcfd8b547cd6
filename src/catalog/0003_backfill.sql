-- What was asked to be backfilled, and how far that is. Numbers are never given twice.
CREATE TABLE backfill (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    sink TEXT,                      -- the only sink that wants it; NULL: every one
    tables TEXT NOT NULL,           -- JSON: globs over schema.table
    filter TEXT,                    -- an SQL condition
    columns TEXT,                   -- JSON: names; NULL: all
    state TEXT NOT NULL,            -- queued, running, paused, done, cancelled, failed
    reason TEXT,
    plan TEXT,                      -- JSON: tables with their sizes
    who TEXT NOT NULL,
    why TEXT,
    created_at INTEGER NOT NULL,
    ended_at INTEGER
) STRICT;

-- Ranges that are read side by side, as JSON with how far each is.
CREATE TABLE backfill_part (
    backfill INTEGER NOT NULL REFERENCES backfill (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    part TEXT NOT NULL,
    PRIMARY KEY (backfill, number)
) STRICT, WITHOUT ROWID;
