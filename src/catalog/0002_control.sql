-- Who paused the sink and why; NULL while it is not paused.
ALTER TABLE sink ADD COLUMN paused TEXT;

-- Changes that somebody skipped: they become dead letters when the sink comes to them.
CREATE TABLE skip (
    sink   TEXT NOT NULL REFERENCES sink (name),
    offset INTEGER NOT NULL,
    by     TEXT NOT NULL,                    -- who and why
    PRIMARY KEY (sink, offset)
) STRICT;
