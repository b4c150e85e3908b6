-- The LuaJIT workload: loops that it compiles, closures, tables, strings.
local bit = require("bit")

local function mandelbrot(side, limit)
  local inside = 0
  for py = 0, side - 1 do
    for px = 0, side - 1 do
      local x0, y0, x, y, n = px / side * 3 - 2, py / side * 2 - 1, 0, 0, 0
      while x * x + y * y < 4 and n < limit do
        x, y, n = x * x - y * y + x0, 2 * x * y + y0, n + 1
      end
      if n == limit then inside = inside + 1 end
    end
  end
  return inside
end

local function sieve(limit)
  local composite, count = {}, 0
  for i = 2, limit do
    if not composite[i] then
      count = count + 1
      for j = i * i, limit, i do composite[j] = true end
    end
  end
  return count
end

local function mix(rounds)
  local x = 1
  for i = 1, rounds do
    x = bit.bxor(bit.rol(x, 5), bit.tobit(x * 3 + i))
  end
  return x
end

local function texts(rounds)
  local counts, seed = {}, 1
  for _ = 1, rounds do
    seed = (seed * 1103515245 + 12345) % 2147483648
    local word = string.format("w%x", bit.rshift(seed, 20))
    counts[word] = (counts[word] or 0) + 1
  end
  local names = {}
  for name in pairs(counts) do names[#names + 1] = name end
  table.sort(names)
  return #names, table.concat(names, ",", 1, 10)
end

print(mandelbrot(120, 200), sieve(300000), mix(2000000), texts(20000))
