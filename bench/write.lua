-- For wrk: writes each message of each body, out of a format and a file with a row for each message.
local file = assert(io.open(os.getenv("BODY") .. ".format", "rb"))
local format, rows = file:read("*a"), {}
file:close()
for line in io.lines(os.getenv("BODY") .. ".rows") do
    local row = {}
    for value in line:gmatch("[^\t]+") do row[#row + 1] = value end
    rows[#rows + 1] = row
end

wrk.method = "POST"
wrk.headers["content-type"] = "application/json"

function request()
    local messages = {}
    for i = 1, #rows do messages[i] = string.format(format, unpack(rows[i])) end
    return wrk.format(nil, nil, nil, '{"data":[' .. table.concat(messages, ",") .. "]}")
end
