-- Each version of each captured table's descriptor, with where it began. Made from the journal's
-- changes, and kept because the journal is trimmed.
CREATE TABLE schema_version (
    source      TEXT NOT NULL,
    lineage     TEXT NOT NULL,
    schema_name TEXT NOT NULL,
    table_name  TEXT NOT NULL,
    version     INTEGER NOT NULL,            -- from 1
    offset      INTEGER NOT NULL,            -- of the first change that carries it
    timeline    INTEGER NOT NULL,
    lsn         INTEGER NOT NULL,
    position    INTEGER NOT NULL,            -- the index within the transaction
    at          INTEGER NOT NULL,            -- when that was committed, in microseconds since 1970
    known       TEXT NOT NULL,
    descriptor  TEXT NOT NULL,               -- JSON
    PRIMARY KEY (source, lineage, schema_name, table_name, version)
) STRICT;

-- The journal of a source has been looked through up to here.
CREATE TABLE schema_scan (
    source    TEXT NOT NULL,
    lineage   TEXT NOT NULL,
    to_offset INTEGER NOT NULL,
    PRIMARY KEY (source, lineage)
) STRICT;

-- Descriptors that break a contract or a compatibility mode, and that somebody accepted.
CREATE TABLE schema_accepted (
    source     TEXT NOT NULL,
    table_name TEXT NOT NULL,                -- schema.name
    digest     TEXT NOT NULL,                -- of what readers see of the descriptor
    by         TEXT NOT NULL,                -- who and why
    at         INTEGER NOT NULL,
    PRIMARY KEY (source, table_name, digest)
) STRICT;
