-- Messages that were delivered together and wait for their acknowledgement: a row for each reply.
CREATE TABLE leases (
    id         INTEGER PRIMARY KEY,          -- of several rows with a message the last one counts
    visible_at INTEGER NOT NULL,             -- microseconds since 1970; then others may have them
    acked      INTEGER NOT NULL,             -- 1: while other parts of their changes are not
    runs       TEXT NOT NULL                 -- [[offset, how many offsets, part, deliveries], ...]
) STRICT;

INSERT INTO leases (visible_at, acked, runs)
    SELECT visible_at, acked, json_array(json_array("offset", 1, part, deliveries)) FROM lease;

DROP TABLE lease;
