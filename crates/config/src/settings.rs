//! The tree as checked, typed settings: what the machine needs to know before any device is made.
//!
//! Names and defaults are those of bhyve_config(5), "GLOBAL SETTINGS"; Apiary's own variables are `engine`, `boot.*`,
//! `cpu.features` and `fw_cfg.*`. A PCI device's own variables are left to the device, which reads them through
//! [`Tree::node`] of its [`PciSlot`].

use std::path::PathBuf;
use std::str::FromStr;

use x86::cpuid::Topology;

use crate::error::SettingError;
use crate::lpc::{FwCfgInterface, SerialBackend};
use crate::pci::{self, PciAddress, PciDevice};
use crate::tree::{Node, Tree};
use crate::value::{HostCpus, Uuid, ValueError, parse_memory_size};

/// All settings of one virtual machine that are not a PCI device's own.
#[derive(Clone, Debug, PartialEq)]
pub struct VmSettings {
    /// `name`.
    pub name: VmName,
    /// `memory.*`.
    pub memory: MemorySettings,
    /// `cpus`, `sockets`, `cores`, `threads`.
    pub topology: Topology,
    /// `cpu.features`, in the order given.
    pub cpu_features: CpuFeatures,
    /// `vcpu.N.cpuset`: the host processors that each virtual one is bound to, one entry per virtual processor;
    /// `None` runs on any.
    pub pinning: Vec<Option<HostCpus>>,
    /// `engine`.
    pub engine: EngineChoice,
    /// `boot.*`, if a kernel is booted directly.
    pub boot: Option<BootSettings>,
    /// `acpi_tables`: make ACPI tables (`-A`).
    pub acpi_tables: bool,
    /// `acpi_tables_in_memory`: place them in guest memory, not only in the firmware configuration interface.
    pub acpi_tables_in_memory: bool,
    /// `x86.mptable`: make an MP table (`-Y` for none).
    pub mp_table: bool,
    /// `x86.x2apic`: local APICs start in x2APIC mode (`-x`).
    pub x2apic: bool,
    /// `x86.strictio`: exit when the guest uses a port that nothing answers (`-e`).
    pub strict_io: bool,
    /// `x86.strictmsr`: unknown MSRs raise #GP; otherwise they read zero and ignore writes (`-w`).
    pub strict_msr: bool,
    /// `x86.vmexit_on_hlt`: HLT gives the host processor away (`-H`).
    pub exit_on_halt: bool,
    /// `x86.vmexit_on_pause`: PAUSE leaves the guest (`-P`).
    pub exit_on_pause: bool,
    /// `destroy_on_poweroff` (`-D`).
    pub destroy_on_poweroff: bool,
    /// `rtc.use_localtime`: the clock shows the host's local time, otherwise UTC (`-u`).
    pub rtc_local_time: bool,
    /// `uuid`; `None` asks for one made from the host's and the machine's name.
    pub uuid: Option<Uuid>,
    /// `bios.*`, `system.*`, `board.*`, `chassis.*`.
    pub smbios: SmbiosStrings,
    /// `virtio_msix`: virtio devices offer MSI-X, otherwise MSI (`-W`).
    pub virtio_msix: bool,
    /// `keyboard.layout`.
    pub keyboard_layout: Option<String>,
    /// `gdb.*`, if a debug server is wanted.
    pub gdb: Option<GdbSettings>,
    /// `tpm.*`, if there is one.
    pub tpm: Option<TpmSettings>,
    /// `fw_cfg.N.*`, in the order of their numbers.
    pub fw_cfg: Vec<FwCfgFile>,
    /// `lpc.*`.
    pub lpc: LpcSettings,
    /// `pci.BUS.SLOT.FUNCTION`, in the order of their addresses.
    pub pci: Vec<PciSlot>,
    /// One-line remarks for the user: settings that are accepted but have no effect.
    pub notes: Vec<String>,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySettings {
    /// `memory.size` in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// `memory.wired`: lock it into host RAM (`-S`).
    pub wired: bool,
    /// `memory.guest_in_core`: have it in core files (`-C`).
    pub in_core: bool,
}

/// A kernel that the machine loads itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSettings {
    /// `boot.kernel`.
    pub kernel: PathBuf,
    /// `boot.initrd`.
    pub initrd: Option<PathBuf>,
    /// `boot.cmdline`; empty if unset.
    pub cmdline: String,
}

/// The debug server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GdbSettings {
    /// `gdb.address`: a host name or address, `localhost` by default.
    pub address: String,
    /// `gdb.port`, not 0.
    pub port: u16,
    /// `gdb.wait`: hold the guest until a debugger connects.
    pub wait: bool,
}

/// The trusted platform module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmSettings {
    /// `tpm.type`.
    pub kind: TpmKind,
    /// `tpm.path`: device or socket of the host.
    pub path: PathBuf,
}

/// What stands behind the guest's TPM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TpmKind {
    /// A TPM device of the host.
    Passthru,
    /// The socket of a running swtpm.
    Swtpm,
}

impl FromStr for TpmKind {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "passthru" => Ok(Self::Passthru),
            "swtpm" => Ok(Self::Swtpm),
            _ => Err(ValueError::Word { value: text.to_owned(), accepted: "passthru, swtpm" }),
        }
    }
}

/// One file of the firmware configuration interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FwCfgFile {
    /// `fw_cfg.N.name`.
    pub name: String,
    /// Where its contents come from.
    pub data: FwCfgData,
}

/// The contents of a [`FwCfgFile`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FwCfgData {
    /// `fw_cfg.N.string`; the guest finds a NUL after it.
    Text(String),
    /// `fw_cfg.N.file`: the bytes of that file.
    File(PathBuf),
}

/// What is behind the LPC bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LpcSettings {
    /// `lpc.bootrom`: firmware to be mapped below 4 GiB.
    pub bootrom: Option<PathBuf>,
    /// `lpc.bootvars`: the firmware's variable store.
    pub bootvars: Option<PathBuf>,
    /// `lpc.fwcfg`.
    pub fwcfg: FwCfgInterface,
    /// `lpc.com1.path` to `lpc.com4.path`; `None` for a port that is not there.
    pub com: [Option<SerialBackend>; 4],
    /// `lpc.pc-testdev`.
    pub test_device: bool,
}

/// A PCI function with a device in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciSlot {
    /// Where it is.
    pub address: PciAddress,
    /// The `device` variable: a model of [`pci::DEVICES`].
    pub device: String,
    /// The path of its node, for [`Tree::node`].
    pub node: String,
}

/// What runs the processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where it is fit, software elsewhere.
    #[default]
    Auto,
    /// KVM, or fail.
    Kvm,
    /// The software CPU.
    Soft,
}

impl FromStr for EngineChoice {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "soft" => Ok(Self::Soft),
            _ => Err(ValueError::Word { value: text.to_owned(), accepted: "auto, kvm, soft" }),
        }
    }
}

/// The name of a virtual machine, which is also the name of its runtime directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VmName(String);

impl VmName {
    /// The longest name, in bytes; bhyve's own limit.
    pub const MAX_LEN: usize = 229;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for VmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let reason = if text.is_empty() {
            "it is empty"
        } else if text.len() > Self::MAX_LEN {
            "it is longer than 229 bytes"
        } else if text.starts_with(['.', '-', '+']) {
            "it starts with a dot, a dash or a plus sign"
        } else if text.contains(['/', '%']) {
            "it contains a slash or a percent sign"
        } else if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            "it contains a space or a control character"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(ValueError::VmName { name: text.to_owned(), reason })
    }
}

/// One change to the processor's features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeature {
    /// The feature's name, in lower case.
    pub name: String,
    /// Whether it is added or taken away.
    pub add: bool,
}

/// Changes to the processor's features, later ones overriding earlier ones (`+avx2,-x2apic`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures(pub Vec<CpuFeature>);

impl FromStr for CpuFeatures {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let change = |item: &str| {
            let (add, name) = match (item.strip_prefix('+'), item.strip_prefix('-')) {
                (Some(name), _) => (true, name),
                (_, Some(name)) => (false, name),
                _ => (true, ""),
            };
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
            if name.is_empty() || !name.chars().all(valid) {
                return Err(ValueError::Feature { item: item.to_owned() });
            }
            Ok(CpuFeature { name: name.to_ascii_lowercase(), add })
        };
        text.split(',').map(change).collect::<Result<_, _>>().map(Self)
    }
}

/// The strings of the SMBIOS tables.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SmbiosStrings {
    pub bios_vendor: String,
    pub bios_version: String,
    pub bios_release_date: String,
    pub system_manufacturer: String,
    pub system_product_name: String,
    pub system_version: String,
    pub system_serial_number: String,
    pub system_sku: String,
    pub system_family_name: String,
    pub board_manufacturer: String,
    pub board_product_name: String,
    pub board_version: String,
    pub board_serial_number: String,
    pub board_asset_tag: String,
    pub board_location: String,
    pub chassis_manufacturer: String,
    pub chassis_version: String,
    pub chassis_serial_number: String,
    pub chassis_asset_tag: String,
    pub chassis_sku: String,
}

impl SmbiosStrings {
    fn from_node(root: &Node<'_>) -> Result<Self, SettingError> {
        Ok(Self {
            bios_vendor: root.string_or("bios.vendor", "BHYVE")?,
            bios_version: root.string_or("bios.version", "14.0")?,
            bios_release_date: root.string_or("bios.release_date", "10/17/2021")?,
            system_manufacturer: root.string_or("system.manufacturer", "FreeBSD")?,
            system_product_name: root.string_or("system.product_name", "BHYVE")?,
            system_version: root.string_or("system.version", "1.0")?,
            system_serial_number: root.string_or("system.serial_number", "None")?,
            system_sku: root.string_or("system.sku", "None")?,
            system_family_name: root.string_or("system.family_name", "Virtual Machine")?,
            board_manufacturer: root.string_or("board.manufacturer", "FreeBSD")?,
            board_product_name: root.string_or("board.product_name", "BHYVE")?,
            board_version: root.string_or("board.version", "1.0")?,
            board_serial_number: root.string_or("board.serial_number", "None")?,
            board_asset_tag: root.string_or("board.asset_tag", "None")?,
            board_location: root.string_or("board.location", "None")?,
            chassis_manufacturer: root.string_or("chassis.manufacturer", "FreeBSD")?,
            chassis_version: root.string_or("chassis.version", "1.0")?,
            chassis_serial_number: root.string_or("chassis.serial_number", "None")?,
            chassis_asset_tag: root.string_or("chassis.asset_tag", "None")?,
            chassis_sku: root.string_or("chassis.sku", "None")?,
        })
    }
}

/// The most virtual processors that any setting can ask for; engines may have less.
const MAX_VCPUS: u64 = u16::MAX as u64;

/// Where memory starts out (bhyve(8), `-m`).
const DEFAULT_MEMORY: &str = "256M";

impl VmSettings {
    /// Reads and checks every variable above the devices. Variables that nothing knows are left alone, as
    /// bhyve_config(5) has it.
    pub fn from_tree(tree: &Tree) -> Result<Self, SettingError> {
        let root = tree.root();
        let mut notes = Vec::new();
        let name =
            root.parsed("name")?.ok_or_else(|| SettingError::Missing { variable: "name".to_owned() })?;
        let topology = topology(&root)?;
        let pci = pci_slots(tree, &mut notes)?;
        let lpc = LpcSettings::from_node(&root.node("lpc"))?;
        if !lpc.is_bare() && !pci.iter().any(|slot| slot.device == "lpc") {
            notes.push(
                "devices of option -l are configured, but the LPC bridge is missing; add -s 31,lpc"
                    .to_owned(),
            );
        }
        check_serial_backends(tree, &lpc, &pci)?;
        Ok(Self {
            name,
            memory: MemorySettings {
                size_bytes: match root.convert("memory.size", parse_memory_size)? {
                    Some(bytes) => bytes,
                    None => parse_memory_size(DEFAULT_MEMORY).map_err(|problem| SettingError::Invalid {
                        variable: "memory.size".to_owned(),
                        problem,
                    })?,
                },
                wired: root.boolean("memory.wired", false)?,
                in_core: root.boolean("memory.guest_in_core", false)?,
            },
            topology,
            cpu_features: root.parsed("cpu.features")?.unwrap_or_default(),
            pinning: pinning(tree, topology.vcpus(), &mut notes)?,
            engine: root.parsed("engine")?.unwrap_or_default(),
            boot: BootSettings::from_node(&root.node("boot"))?,
            acpi_tables: root.boolean("acpi_tables", false)?,
            acpi_tables_in_memory: root.boolean("acpi_tables_in_memory", true)?,
            mp_table: root.boolean("x86.mptable", true)?,
            x2apic: root.boolean("x86.x2apic", false)?,
            strict_io: root.boolean("x86.strictio", false)?,
            strict_msr: root.boolean("x86.strictmsr", true)?,
            exit_on_halt: root.boolean("x86.vmexit_on_hlt", false)?,
            exit_on_pause: root.boolean("x86.vmexit_on_pause", false)?,
            destroy_on_poweroff: root.boolean("destroy_on_poweroff", false)?,
            rtc_local_time: root.boolean("rtc.use_localtime", true)?,
            uuid: root.parsed("uuid")?,
            smbios: SmbiosStrings::from_node(&root)?,
            virtio_msix: root.boolean("virtio_msix", true)?,
            keyboard_layout: root.string("keyboard.layout")?,
            gdb: GdbSettings::from_node(&root.node("gdb"))?,
            tpm: TpmSettings::from_node(&root.node("tpm"))?,
            fw_cfg: fw_cfg(&root.node("fw_cfg"))?,
            lpc,
            pci,
            notes,
        })
    }
}

/// bhyve(8), `-c`: what is not given is 1; processors alone are sockets of one core.
fn topology(root: &Node<'_>) -> Result<Topology, SettingError> {
    let count = |name| -> Result<Option<u64>, SettingError> {
        let count = root.integer(name, 1..=MAX_VCPUS as i64)?;
        Ok(count.map(i64::unsigned_abs))
    };
    let cpus = count("cpus")?;
    let cores = count("cores")?.unwrap_or(1);
    let threads = count("threads")?.unwrap_or(1);
    let sockets = match count("sockets")? {
        Some(sockets) => sockets,
        None => cpus.filter(|_| cores * threads == 1).unwrap_or(1),
    };
    let product = sockets * cores * threads;
    if let Some(cpus) = cpus.filter(|cpus| *cpus != product) {
        return Err(SettingError::Topology { cpus, sockets, cores, threads, product });
    }
    match (u32::try_from(sockets), u32::try_from(cores), u32::try_from(threads)) {
        (Ok(sockets), Ok(cores), Ok(threads)) if product <= MAX_VCPUS => {
            Ok(Topology { sockets, cores, threads })
        }
        _ => Err(SettingError::TooManyCpus { count: product, max: MAX_VCPUS }),
    }
}

/// One entry per virtual processor. As in bhyve, a set for a processor that the machine does not have is no error.
fn pinning(tree: &Tree, vcpus: u32, notes: &mut Vec<String>) -> Result<Vec<Option<HostCpus>>, SettingError> {
    let mut pinning = vec![None; vcpus as usize];
    for number in tree.children("vcpu") {
        let set = tree.node("vcpu").node(&number).parsed::<HostCpus>("cpuset")?;
        match number.parse::<usize>().ok().and_then(|number| pinning.get_mut(number)) {
            Some(entry) => *entry = set,
            None => notes.push(format!(
                "virtual CPU {number} is to be pinned, but there are only CPUs 0 to {}; it is ignored (option -p)",
                vcpus.saturating_sub(1)
            )),
        }
    }
    Ok(pinning)
}

fn pci_slots(tree: &Tree, notes: &mut Vec<String>) -> Result<Vec<PciSlot>, SettingError> {
    let mut slots: Vec<PciSlot> = Vec::new();
    for bus in tree.children("pci") {
        for slot in tree.children(&format!("pci.{bus}")) {
            for function in tree.children(&format!("pci.{bus}.{slot}")) {
                slots.push(pci_slot(tree, &bus, &slot, &function)?);
            }
        }
    }
    let mut bridge: Option<&PciSlot> = None;
    for slot in slots.iter().filter(|slot| slot.device == "lpc") {
        let problem = if bridge.is_some() {
            "there is an LPC bridge already, and it cannot be there twice"
        } else if slot.address.bus != 0 {
            "the LPC bridge can only be on bus 0"
        } else {
            bridge = Some(slot);
            continue;
        };
        return Err(SettingError::Lpc { variable: slot.node.clone(), problem });
    }
    for slot in &slots {
        let first = PciAddress { function: 0, ..slot.address };
        if !slots.iter().any(|other| other.address == first) {
            notes.push(format!(
                "the guest will not find the {} at {}: function 0 of that slot is empty",
                slot.device, slot.address
            ));
        }
    }
    Ok(slots)
}

fn pci_slot(tree: &Tree, bus: &str, slot: &str, function: &str) -> Result<PciSlot, SettingError> {
    let node = format!("pci.{bus}.{slot}.{function}");
    let bad = |problem: String| SettingError::PciAddress { variable: node.clone(), problem };
    let address = PciAddress::from_decimal(bus, slot, function).map_err(|error| bad(error.to_string()))?;
    if address.node() != node {
        return Err(bad("numbers are written without leading zeros".to_owned()));
    }
    let device = tree.node(&node).required("device")?;
    if PciDevice::by_model(&device).is_none() {
        return Err(SettingError::UnknownDevice {
            variable: format!("{node}.device"),
            suggestion: pci::nearest_name(&device),
            device,
            known: pci::known_models(),
        });
    }
    Ok(PciSlot { address, device, node })
}

/// Every serial port needs a backend of its own.
fn check_serial_backends(tree: &Tree, lpc: &LpcSettings, pci: &[PciSlot]) -> Result<(), SettingError> {
    let mut users: Vec<(SerialBackend, String)> = Vec::new();
    let com = lpc
        .com
        .iter()
        .zip(1..)
        .filter_map(|(backend, n)| Some((backend.clone()?, format!("lpc.com{n}.path"))));
    users.extend(com);
    for slot in pci.iter().filter(|slot| slot.device == "uart") {
        let node = tree.node(&slot.node);
        users.extend(node.parsed("path")?.map(|backend| (backend, node.path_of("path"))));
    }
    for (index, (backend, second)) in users.iter().enumerate() {
        if let Some((_, first)) = users[..index].iter().find(|(earlier, _)| earlier == backend) {
            let (first, second) = (first.clone(), second.clone());
            return Err(SettingError::BackendTwice { backend: backend.to_string(), first, second });
        }
    }
    Ok(())
}

fn fw_cfg(node: &Node<'_>) -> Result<Vec<FwCfgFile>, SettingError> {
    let mut files = Vec::new();
    for number in node.children() {
        let file = node.node(&number);
        let name = file.required("name")?;
        let data = match file.string("string")? {
            Some(text) => FwCfgData::Text(text),
            None => FwCfgData::File(file.required("file")?.into()),
        };
        files.push(FwCfgFile { name, data });
    }
    Ok(files)
}

impl BootSettings {
    fn from_node(boot: &Node<'_>) -> Result<Option<Self>, SettingError> {
        let initrd = boot.string("initrd")?.map(PathBuf::from);
        let cmdline = boot.string("cmdline")?;
        if let Some(kernel) = boot.string("kernel")? {
            return Ok(Some(Self { kernel: kernel.into(), initrd, cmdline: cmdline.unwrap_or_default() }));
        }
        let needs_kernel = |variable, reason| SettingError::Needs { variable, needs: "boot.kernel", reason };
        match (initrd, cmdline) {
            (Some(_), _) => {
                Err(needs_kernel("boot.initrd", "an initial file system goes with a kernel (--kernel)"))
            }
            (None, Some(_)) => {
                Err(needs_kernel("boot.cmdline", "a command line goes with a kernel (--kernel)"))
            }
            (None, None) => Ok(None),
        }
    }
}

impl GdbSettings {
    fn from_node(gdb: &Node<'_>) -> Result<Option<Self>, SettingError> {
        let port = gdb.integer("port", 0..=u16::MAX.into())?.and_then(|port| u16::try_from(port).ok());
        let wait = gdb.boolean("wait", false)?;
        let address = gdb.string_or("address", "localhost")?;
        Ok(port.filter(|port| *port != 0).map(|port| Self { address, port, wait }))
    }
}

impl TpmSettings {
    fn from_node(tpm: &Node<'_>) -> Result<Option<Self>, SettingError> {
        let Some(kind) = tpm.parsed("type")? else { return Ok(None) };
        tpm.convert("version", |version| match version {
            "2.0" => Ok(()),
            _ => Err(ValueError::Word { value: version.to_owned(), accepted: "2.0" }),
        })?;
        Ok(Some(Self { kind, path: tpm.required("path")?.into() }))
    }
}

impl LpcSettings {
    fn from_node(lpc: &Node<'_>) -> Result<Self, SettingError> {
        let com = |name: &str| lpc.node(name).parsed("path");
        let settings = Self {
            bootrom: lpc.string("bootrom")?.map(PathBuf::from),
            bootvars: lpc.string("bootvars")?.map(PathBuf::from),
            fwcfg: lpc.parsed("fwcfg")?.unwrap_or_default(),
            com: [com("com1")?, com("com2")?, com("com3")?, com("com4")?],
            test_device: lpc.boolean("pc-testdev", false)?,
        };
        if settings.bootvars.is_some() && settings.bootrom.is_none() {
            return Err(SettingError::Needs {
                variable: "lpc.bootvars",
                needs: "lpc.bootrom",
                reason: "variables belong to a boot ROM (-l bootrom,FILE,VARIABLE FILE)",
            });
        }
        Ok(settings)
    }

    /// Whether nothing is behind the bridge.
    fn is_bare(&self) -> bool {
        !self.test_device && self.com.iter().all(Option::is_none)
    }
}
