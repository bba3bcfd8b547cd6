-- Appends the entries of one batch and the progress behind them, all of it or nothing.
--
-- KEYS  the key of the progress, then each stream once
-- ARGV  the progress that the sink saw last ('' for none), the new one, MAXLEN (0 for none); then
--       for each entry the number of its stream among KEYS, the count of its names and values
--       together, and those
--
-- Answers {'ok'}, {'stale', the progress that is stored} or {'type', a key, its type}.

local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'string' and kind ~= 'none' then return {'type', KEYS[1], kind} end
local stored = redis.call('GET', KEYS[1]) or ''
if stored ~= ARGV[1] then return {'stale', stored} end
for i = 2, #KEYS do
    kind = redis.call('TYPE', KEYS[i]).ok
    if kind ~= 'stream' and kind ~= 'none' then return {'type', KEYS[i], kind} end
end

local maxlen, keys, ids, at = ARGV[3], {}, {}, 4
while at <= #ARGV do
    local key, last, id = KEYS[tonumber(ARGV[at])], at + 1 + ARGV[at + 1]
    -- Unpacked in the call: to build a table for each entry takes a fifth more time.
    if maxlen == '0' then
        id = redis.pcall('XADD', key, '*', unpack(ARGV, at + 2, last))
    else
        id = redis.pcall('XADD', key, 'MAXLEN', '~', maxlen, '*', unpack(ARGV, at + 2, last))
    end
    if type(id) == 'table' then
        -- Redis takes nothing back by itself, and nobody has seen these yet.
        for i, one in ipairs(ids) do redis.call('XDEL', keys[i], one) end
        return id
    end
    keys[#keys + 1], ids[#ids + 1] = key, id
    at = last + 1
end
redis.call('SET', KEYS[1], ARGV[2])
return {'ok'}
