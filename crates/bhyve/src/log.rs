//! What the machine's parts say while it runs: one line each on standard error.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Warnings and errors are shown from here on.
pub fn start() {
    let lines =
        tracing_subscriber::fmt().with_max_level(Level::WARN).with_writer(io::stderr).with_ansi(false);
    lines.event_format(Line).init();
}

/// A guest's console may have made the terminal raw; one that is not takes the carriage return as well.
pub fn end_of_line() -> &'static str {
    if io::stderr().is_terminal() { "\r\n" } else { "\n" }
}

/// An event as bhyve tells everything.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "bhyve: ")?;
        context.format_fields(writer.by_ref(), event)?;
        write!(writer, "{}", end_of_line())
    }
}
