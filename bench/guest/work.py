# The python workload: objects, dictionaries, strings, big integers, generators.


class Account:
    def __init__(self, name):
        self.name = name
        self.balance = 0

    def add(self, amount):
        self.balance += amount


def words(count, seed=1):
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % 2147483648
        yield "w%x" % (seed >> 20)


def primes(limit):
    sieve = bytearray([1]) * limit
    for i in range(2, limit):
        if sieve[i]:
            for j in range(i * i, limit, i):
                sieve[j] = 0
    return sum(sieve) - 2


counts = {}
for word in words(12000):
    counts[word] = counts.get(word, 0) + len(word)
accounts = {name: Account(name) for name in sorted(counts)}
for name, amount in counts.items():
    accounts[name].add(amount)
total = sum(account.balance for account in accounts.values())
matrix = [[i * j % 7 for j in range(30)] for i in range(30)]
product = [[sum(a * b for a, b in zip(row, column)) for column in zip(*matrix)] for row in matrix]
factorial = 1
for i in range(1, 400):
    factorial *= i
print(total, len(accounts), primes(30000), product[7][11], len(str(factorial)), ",".join(sorted(counts)[:20]))
