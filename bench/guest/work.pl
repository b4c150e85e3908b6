# The perl workload: hashes, regular expressions, strings, arithmetic.
use strict;
use warnings;

my ($seed, %counts, @lines) = (1);
for my $i (1 .. 20000) {
    $seed = ($seed * 1103515245 + 12345) % 2147483648;
    my $word = sprintf "w%x", $seed >> 20;
    $counts{$word} += length $word;
    push @lines, "$i: $word" if $i % 4 == 0;
}
my ($matches, $sum) = (0, 0);
for my $line (@lines) {
    if ($line =~ /^(\d+): w([0-9a-f]*[aeiou13579])(.*)$/) {
        $matches++;
        $sum += $1 % 97 + hex($2 || 0) + length $3;
    }
    (my $changed = $line) =~ s/([a-f])(\d)/$2$1/g;
    $sum += ord substr $changed, -1;
}
my @sorted = sort { $counts{$b} <=> $counts{$a} || $a cmp $b } keys %counts;
my ($x, $y) = (1, 0);
for (1 .. 100000) { $x = ($x * 69069 + $y) % 4294967296; $y ^= $x >> 7; }
print join(",", $matches, $sum, scalar @sorted, @sorted[0 .. 9], $x, $y), "\n";
