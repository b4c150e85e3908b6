-- What a just-in-time compiler does to a processor: code that is made, run, patched and thrown away all the time. The
-- same script run with the compiler off gives the same lines; jit.sh compares them.
local bit, ffi = require("bit"), require("ffi")
local rounds = tonumber(arg[1]) or 1

ffi.cdef([[
typedef struct { int32_t x; double y; uint8_t tag[4]; } item;
size_t strlen(const char *);
int abs(int);
void qsort(void *, size_t, size_t, int (*)(const int32_t *, const int32_t *));
]])

local function sum(n)
  local total = 0
  for i = 1, n do total = total + (i % 7 == 0 and -i or i) end
  return total
end

local function strings(n)
  local parts = {}
  for i = 1, n do
    local s = string.format("%d:%x", i, bit.bxor(i, bit.lshift(i, 3)))
    parts[#parts + 1] = (s:gsub("%d", function(d) return d == "7" and "seven" or nil end))
  end
  local all = table.concat(parts, " ")
  return #all, all:sub(-40)
end

-- Side exits: the types of what the loop sees change under it.
local function changing(n)
  local values, total = { 1, 2.5, "3", 4, true, false, "x5" }, 0
  for i = 1, n do
    local value = values[i % #values + 1]
    local number = tonumber(value)
    if number then
      total = total + number
    elseif value == true then
      total = total - 1
    elseif type(value) == "string" then
      total = total + #value
    end
  end
  return total
end

local function structures(n)
  local items, total = ffi.new("item[?]", 64), 0
  for i = 0, n - 1 do
    local item = items[i % 64]
    item.x = bit.tobit(item.x * 31 + i)
    item.y = item.y / 2 + item.x
    item.tag[i % 4] = i % 251
    total = (total + item.y + item.tag[(i + 1) % 4]) % 1e9
  end
  return string.format("%.6f", total), items[13].x
end

local function foreign(n)
  local total = 0
  for i = 1, n do total = total + ffi.C.abs(-i) + tonumber(ffi.C.strlen("four")) end
  local numbers = ffi.new("int32_t[100]")
  for i = 0, 99 do numbers[i] = (i * 7919) % 1009 end
  -- A callback: the library's code calls what Lua has made.
  local compare = ffi.cast("int (*)(const int32_t *, const int32_t *)", function(a, b) return a[0] - b[0] end)
  ffi.C.qsort(numbers, 100, 4, compare)
  compare:free()
  for i = 1, 99 do assert(numbers[i - 1] <= numbers[i]) end
  return total, numbers[50]
end

local function errors(n)
  local caught = 0
  for i = 1, n do
    local ok, message = pcall(function(k) if k % 3 == 0 then error("no " .. k, 0) end return k end, i)
    if not ok and message == "no " .. i then caught = caught + 1 end
  end
  return caught
end

local function coroutines(n)
  local function generate(limit)
    return coroutine.wrap(function() for i = 1, limit do coroutine.yield(i * i) end end)
  end
  local total = 0
  for i = 1, n do
    for square in generate(i % 9) do total = total + square end
  end
  return total
end

-- New functions, compiled from text each time.
local function texts(n)
  local total = 0
  for i = 1, n do
    local f = assert(loadstring(("local s = 0; for i = 1, %d do s = s + i * %d end; return s"):format(100 + i % 50, i)))
    total = (total + f()) % 1e9
  end
  return total
end

for round = 1, rounds do
  print(round, sum(60000 + round), strings(1500), changing(15000))
  print(round, structures(40000), foreign(5000))
  print(round, errors(3000), coroutines(1500), texts(150))
  collectgarbage()
end
