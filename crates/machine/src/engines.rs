//! Which engines there are and which one runs a machine.

use engine::{Engine, EngineKind, Fitness};

use crate::MachineError;

/// Every engine of this build, the preferred one first.
pub fn engines() -> Vec<Box<dyn Engine>> {
    vec![Box::new(engine_kvm::KvmEngine::new()), Box::new(engine_soft::SoftEngine::new())]
}

/// Chooses one of `engines`: the one of `wanted` kind as it is, or with `None` (`auto`) the first that proves fit.
/// Where `auto` passes an engine over, or the wanted one is not fit, `notice` is told why, in one line.
///
/// # Errors
/// The build has no such engine, or none of its engines is fit.
pub fn choose(
    engines: Vec<Box<dyn Engine>>,
    wanted: Option<EngineKind>,
    notice: &mut dyn FnMut(&str),
) -> Result<Box<dyn Engine>, MachineError> {
    if let Some(kind) = wanted {
        let engine =
            engines.into_iter().find(|e| e.kind() == kind).ok_or(MachineError::NoSuchEngine(kind))?;
        if let Fitness::Unfit(why) = engine.probe() {
            notice(&format!("engine {kind} is used as asked, but guests may not run ({why})"));
        }
        return Ok(engine);
    }
    let mut passed_over: Option<(EngineKind, String)> = None;
    for engine in engines {
        match engine.probe() {
            Fitness::Fit => {
                if let Some((kind, why)) = passed_over {
                    notice(&format!("engine auto: {kind} is passed over ({why}); using {}", engine.kind()));
                }
                return Ok(engine);
            }
            Fitness::Unfit(why) => {
                passed_over.get_or_insert((engine.kind(), why));
            }
        }
    }
    let why = passed_over.map_or("this build has no engine".into(), |(kind, why)| format!("{kind}: {why}"));
    Err(MachineError::NoFitEngine(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{EngineError, Vm, VmConfig};
    use std::sync::Arc;
    use x86::cpuid::CpuidTable;

    struct Stub(EngineKind, Fitness);

    impl Engine for Stub {
        fn kind(&self) -> EngineKind {
            self.0
        }
        fn probe(&self) -> Fitness {
            self.1.clone()
        }
        fn supported_cpuid(&self) -> engine::Result<CpuidTable> {
            Ok(CpuidTable::new())
        }
        fn create_vm(&self, _: VmConfig) -> engine::Result<Arc<dyn Vm>> {
            Err(EngineError::Unsupported("a stub".into()))
        }
    }

    fn pick(
        kvm: Fitness,
        soft: Fitness,
        wanted: Option<EngineKind>,
    ) -> (Result<EngineKind, String>, Vec<String>) {
        let engines: Vec<Box<dyn Engine>> =
            vec![Box::new(Stub(EngineKind::Kvm, kvm)), Box::new(Stub(EngineKind::Soft, soft))];
        let mut notices = Vec::new();
        let chosen = choose(engines, wanted, &mut |line| notices.push(line.to_owned()));
        (chosen.map(|e| e.kind()).map_err(|e| e.to_string()), notices)
    }

    #[test]
    fn auto_takes_the_first_fit_engine_and_says_what_it_passed_over() {
        use EngineKind::{Kvm, Soft};
        let unfit = |why: &str| Fitness::Unfit(why.into());
        assert_eq!(pick(Fitness::Fit, Fitness::Fit, None), (Ok(Kvm), vec![]));
        let (chosen, notices) = pick(unfit("it only emulates"), Fitness::Fit, None);
        assert_eq!(chosen, Ok(Soft));
        assert_eq!(notices, ["engine auto: kvm is passed over (it only emulates); using soft"]);
        let (chosen, notices) = pick(unfit("it only emulates"), Fitness::Fit, Some(Kvm));
        assert_eq!(chosen, Ok(Kvm), "who asks for it gets it");
        assert_eq!(notices, ["engine kvm is used as asked, but guests may not run (it only emulates)"]);
        assert_eq!(pick(Fitness::Fit, Fitness::Fit, Some(Soft)), (Ok(Soft), vec![]));
        let (none, _) = pick(unfit("no /dev/kvm"), unfit("x"), None);
        assert!(none.unwrap_err().contains("no /dev/kvm"));
    }
}
