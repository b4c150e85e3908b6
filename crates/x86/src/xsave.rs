//! Layout of the XSAVE area in standard form (SDM 1 §13.4). An area saved on one engine has to load on
//! another, so Apiary fixes one set of offsets: those that Intel processors report in CPUID leaf 0DH. A
//! processor may place components elsewhere (AMD's Zen 4 leaves no hole after AVX); an engine whose host
//! differs moves the components when it saves and loads.

/// The CPUID leaf that describes the area: components in subleaf 0, each one's size and offset in its own.
pub const CPUID_LEAF: u32 = 0xd;
/// Bytes of the legacy (FXSAVE) region.
pub const LEGACY_BYTES: usize = 512;
/// Offset of the XSAVE header.
pub const HEADER: usize = 512;
/// Offset of XSTATE_BV in the area.
pub const XSTATE_BV: usize = 512;
/// Offset of XCOMP_BV in the area.
pub const XCOMP_BV: usize = 520;
/// Bytes of legacy region and header together.
pub const MIN_BYTES: usize = 576;
/// Bytes of the area with every component up to PKRU.
pub const MAX_BYTES: usize = 2696;

/// State components (bits of XCR0 and XSTATE_BV).
pub mod component {
    /// x87.
    pub const X87: u64 = 1 << 0;
    /// XMM registers and MXCSR.
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of YMM0–15.
    pub const AVX: u64 = 1 << 2;
    /// Opmask registers k0–7.
    pub const OPMASK: u64 = 1 << 5;
    /// Upper halves of ZMM0–15.
    pub const ZMM_HI256: u64 = 1 << 6;
    /// ZMM16–31.
    pub const HI16_ZMM: u64 = 1 << 7;
    /// Protection-key rights.
    pub const PKRU: u64 = 1 << 9;
}

/// One extended component: its XCR0 bit number, offset and size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Bit number in XCR0.
    pub bit: u32,
    /// Offset in the standard-form area.
    pub offset: usize,
    /// Size in bytes.
    pub len: usize,
}

/// The extended components Apiary knows, in order of offset.
pub const EXTENDED: [Component; 5] = [
    Component { bit: 2, offset: 576, len: 256 },
    Component { bit: 5, offset: 1088, len: 64 },
    Component { bit: 6, offset: 1152, len: 512 },
    Component { bit: 7, offset: 1664, len: 1024 },
    Component { bit: 9, offset: 2688, len: 8 },
];
