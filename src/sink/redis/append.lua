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

local maxlen, added, at = ARGV[3], {}, 4
while at <= #ARGV do
    local key, count = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1])
    local entry = {'XADD', key, '*'}
    if maxlen ~= '0' then entry = {'XADD', key, 'MAXLEN', '~', maxlen, '*'} end
    for i = at + 2, at + 1 + count do entry[#entry + 1] = ARGV[i] end
    local id = redis.pcall(unpack(entry))
    if type(id) == 'table' then
        -- Redis takes nothing back by itself, and nobody has seen these yet.
        for _, one in ipairs(added) do redis.call('XDEL', one[1], one[2]) end
        return id
    end
    added[#added + 1] = {key, id}
    at = at + 2 + count
end
redis.call('SET', KEYS[1], ARGV[2])
return {'ok'}
