//! The suite's results as a page that people read.

use std::fmt::Write as _;

use crate::engine::Engine;
use crate::numbers::{geometric_mean, median};
use crate::suite::{Configuration, Results, of_kind};
use crate::work::{Kind, Workload};

/// What two times are compared as: the first divided by the second.
type Ratio = (Engine, Engine);

fn ratio(configuration: &Configuration, workload: &Workload, (above, below): Ratio) -> Option<f64> {
    let seconds = |engine| configuration.side(engine)?.seconds(workload);
    Some(seconds(above)? / seconds(below)?)
}

/// Those that make sense with the engines that were there.
fn ratios(configuration: &Configuration) -> Vec<Ratio> {
    let there = |engine: &Engine| configuration.side(*engine).is_some();
    [
        (Engine::Soft, Engine::Host),
        (Engine::Interp, Engine::Host),
        (Engine::Qemu, Engine::Host),
        (Engine::Qemu, Engine::Soft),
        (Engine::Qemu, Engine::Interp),
        (Engine::Interp, Engine::Soft),
    ]
    .into_iter()
    .filter(|(above, below)| there(above) && there(below))
    .collect()
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn row(text: &mut String, cells: impl IntoIterator<Item = String>) {
    let cells: Vec<_> = cells.into_iter().collect();
    // Writing to a String does not fail.
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn kind_table(text: &mut String, results: &Results, configuration: &Configuration, kind: Kind) {
    let workloads: Vec<_> = of_kind(&results.workloads, kind).collect();
    if workloads.is_empty() {
        return;
    }
    let ratios = ratios(configuration);
    let engines: Vec<_> = configuration.sides.iter().map(|side| side.engine).collect();
    let name = match kind {
        Kind::Compute => "compute",
        Kind::System => "system",
    };
    let heads = engines.iter().map(|engine| format!("{engine} ms"));
    let ratio_heads = ratios.iter().map(|(above, below)| format!("{above}/{below}"));
    row(text, std::iter::once(name.to_owned()).chain(heads).chain(ratio_heads));
    row(text, std::iter::repeat_n("---".to_owned(), 1 + engines.len() + ratios.len()));
    for workload in &workloads {
        let times = configuration
            .sides
            .iter()
            .map(|side| number(side.seconds(workload).map(|seconds| seconds * 1000.0)));
        let compared = ratios.iter().map(|which| number(ratio(configuration, workload, *which)));
        row(text, std::iter::once(workload.name.clone()).chain(times).chain(compared));
    }
    let means = ratios.iter().map(|which| {
        let values: Vec<_> =
            workloads.iter().filter_map(|workload| ratio(configuration, workload, *which)).collect();
        format!("**{}**", number((!values.is_empty()).then(|| geometric_mean(&values))))
    });
    let empty = std::iter::repeat_n(String::new(), engines.len());
    row(text, std::iter::once("**geometric mean**".to_owned()).chain(empty).chain(means));
    text.push('\n');
}

fn rest_table(text: &mut String, configuration: &Configuration) {
    let sides: Vec<_> = configuration.sides.iter().filter(|side| !side.boot_s.is_empty()).collect();
    if sides.is_empty() {
        return;
    }
    row(text, std::iter::once(String::new()).chain(sides.iter().map(|side| side.engine.to_string())));
    row(text, std::iter::repeat_n("---".to_owned(), 1 + sides.len()));
    let mut line = |name: &str, value: &dyn Fn(&crate::suite::Side) -> Option<f64>| {
        let values = sides.iter().map(|side| number(value(side)));
        row(text, std::iter::once(name.to_owned()).chain(values));
    };
    line("start to user space, s", &|side| Some(median(&side.boot_s)));
    line("idle guest, % of one processor", &|side| Some(side.idle.as_ref()?.processor_percent));
    line("memory beyond the guest's and code, MiB", &|side| Some(side.idle.as_ref()?.memory_mib));
    line("generated code, MiB", &|side| Some(side.idle.as_ref()?.code_mib));
    text.push('\n');
}

/// The whole page.
pub fn markdown(results: &Results) -> String {
    let what = if results.least { "The quickest passes" } else { "Medians" };
    let mut text = format!(
        "# Guest benchmark suite\n\n{}, {} of memory, on {}; {}. {what} of {} rounds; docs/performance.md explains.\n\n",
        results.guest, results.memory, results.host, results.peer, results.rounds
    );
    for configuration in &results.configurations {
        let _ = writeln!(text, "## Processors: {}\n", configuration.cpus);
        kind_table(&mut text, results, configuration, Kind::Compute);
        kind_table(&mut text, results, configuration, Kind::System);
        rest_table(&mut text, configuration);
    }
    if !results.problems.is_empty() {
        text.push_str("## Problems\n\n");
        for problem in &results.problems {
            let _ = writeln!(text, "- {}", problem.replace('\n', " "));
        }
    }
    text
}
