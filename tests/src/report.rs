//! What the lab's guest says about itself: the lines that begin with `apiary: ` (see `lab/guest/lab/boot`).

/// A guest's report, from all that its console said.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    console: &'a str,
}

impl<'a> Report<'a> {
    /// Takes the console's text.
    pub fn new(console: &'a str) -> Self {
        Self { console }
    }

    /// The value of the line `apiary: KEY: VALUE`.
    pub fn value(&self, key: &str) -> Option<&'a str> {
        let start = format!("apiary: {key}: ");
        self.console.lines().find_map(|line| line.strip_prefix(start.as_str())).map(str::trim)
    }

    /// How many processors the guest sees.
    pub fn processors(&self) -> Option<u32> {
        self.value("processors")?.parse().ok()
    }

    /// How much memory the guest's kernel has to give, in MiB.
    pub fn memory_mib(&self) -> Option<u64> {
        self.value("memory")?.strip_suffix(" KiB")?.parse::<u64>().ok().map(|kib| kib / 1024)
    }

    /// The lines that the guest printed between `apiary: begin WHAT` and `apiary: end WHAT`.
    pub fn section(&self, what: &str) -> Vec<&'a str> {
        let begin = format!("apiary: begin {what}");
        let end = format!("apiary: end {what}");
        self.console
            .lines()
            .map(str::trim_end)
            .skip_while(|line| *line != begin)
            .skip(1)
            .take_while(|line| *line != end)
            .collect()
    }

    /// The values of a key in the section `cpuinfo`, one per processor.
    pub fn cpuinfo(&self, key: &str) -> Vec<&'a str> {
        self.section("cpuinfo")
            .into_iter()
            .filter_map(|line| line.split_once(':'))
            .filter(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim())
            .collect()
    }

    /// The kernel's warnings and errors (level 4 and lower) in the section `dmesg`, without their times.
    pub fn complaints(&self) -> Vec<&'a str> {
        self.section("dmesg")
            .into_iter()
            .filter_map(|line| {
                let (level, rest) = line.strip_prefix('<')?.split_once('>')?;
                // The low three bits are the level, the others say who speaks.
                let level: u32 = level.parse().ok()?;
                let text = rest.split_once("] ").map_or(rest, |(_, text)| text);
                (level % 8 <= 4).then_some(text)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "[    1.8] Run /init as init process\r
apiary: userspace\r
apiary: processors: 2\r
apiary: memory: 480036 KiB\r
apiary: begin dmesg\r
<6>[    0.000000] Linux version 6.1\r
<4>[    0.812733] mtrr: inconsistent\r
<3>[    0.9] ACPI Error: no\r
apiary: end dmesg\r
apiary: begin cpuinfo\r
processor\t: 0\r
physical id\t: 0\r
processor\t: 1\r
physical id\t: 1\r
apiary: end cpuinfo\r
";

    #[test]
    fn a_report_is_read() {
        let report = Report::new(CONSOLE);
        assert_eq!(report.processors(), Some(2));
        assert_eq!(report.memory_mib(), Some(468));
        assert_eq!(report.complaints(), ["mtrr: inconsistent", "ACPI Error: no"]);
        assert_eq!(report.cpuinfo("physical id"), ["0", "1"]);
        assert_eq!(report.value("uptime"), None);
        assert!(report.section("iomem").is_empty());
    }
}
