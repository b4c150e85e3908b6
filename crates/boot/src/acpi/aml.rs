//! AML built from the bottom up: every piece is bytes that have been encoded already, so pieces made at run time nest without
//! borrowing from each other. Encoding is `acpi_tables`'; the resource descriptors that it lacks are here (ACPI 6.5 §6.4).

use acpi_tables::{Aml, AmlSink, aml};

/// Encoded AML.
#[derive(Clone, Debug, Default)]
pub(super) struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Encoded {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Encodes anything that `acpi_tables` can.
pub(super) fn encode(term: &dyn Aml) -> Encoded {
    let mut bytes = Vec::new();
    term.to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

fn borrow(terms: &[Encoded]) -> Vec<&dyn Aml> {
    terms.iter().map(|term| term as &dyn Aml).collect()
}

/// Terms one after the other.
pub(super) fn sequence(terms: impl IntoIterator<Item = Encoded>) -> Encoded {
    Encoded(terms.into_iter().flat_map(|term| term.0).collect())
}

pub(super) fn path(name: &str) -> aml::Path {
    aml::Path::new(name)
}

pub(super) fn scope(name: &str, terms: &[Encoded]) -> Encoded {
    encode(&aml::Scope::new(path(name), borrow(terms)))
}

pub(super) fn device(name: &str, terms: &[Encoded]) -> Encoded {
    encode(&aml::Device::new(path(name), borrow(terms)))
}

pub(super) fn name(name: &str, value: &dyn Aml) -> Encoded {
    encode(&aml::Name::new(path(name), value))
}

/// `Name (id, EisaId (eisa))`.
pub(super) fn hardware_id(id: &str, eisa: &str) -> Encoded {
    name(id, &aml::EISAName::new(eisa))
}

pub(super) fn method(name: &str, arguments: u8, serialized: bool, terms: &[Encoded]) -> Encoded {
    encode(&aml::Method::new(path(name), arguments, serialized, borrow(terms)))
}

pub(super) fn package(elements: &[Encoded]) -> Encoded {
    // Package () holds at most 255 elements in its byte count; a longer one needs VarPackage.
    match u8::try_from(elements.len()) {
        Ok(_) => encode(&aml::Package::new(borrow(elements))),
        Err(_) => {
            let mut content = Vec::new();
            (elements.len() as u64).to_aml_bytes(&mut content);
            elements.iter().for_each(|element| content.extend_from_slice(&element.0));
            let mut bytes = vec![VAR_PACKAGE_OP];
            bytes.extend_from_slice(&package_length(content.len()));
            bytes.extend_from_slice(&content);
            Encoded(bytes)
        }
    }
}

const VAR_PACKAGE_OP: u8 = 0x13;

/// PkgLength of `content` bytes, the length's own bytes included (§20.2.4).
fn package_length(content: usize) -> Vec<u8> {
    if content + 1 < 1 << 6 {
        return vec![(content + 1) as u8];
    }
    let extra = if content + 2 < 1 << 12 {
        1
    } else if content + 3 < 1 << 20 {
        2
    } else {
        3
    };
    let total = content + 1 + extra;
    let mut bytes = vec![(extra as u8) << 6 | (total & 0xf) as u8];
    bytes.extend((0..extra).map(|i| (total >> (4 + 8 * i)) as u8));
    bytes
}

/// `Name (_CRS, ResourceTemplate () {…})`.
pub(super) fn resources(descriptors: &[Encoded]) -> Encoded {
    name("_CRS", &aml::ResourceTemplate::new(borrow(descriptors)))
}

/// A fixed range of ports.
pub(super) fn ports(base: u16, count: u8) -> Encoded {
    encode(&aml::IO::new(base, base, 1, count))
}

/// A fixed range of memory.
pub(super) fn memory(base: u32, len: u32) -> Encoded {
    encode(&aml::Memory32Fixed::new(true, base, len))
}

/// An ISA interrupt, edge-triggered and active high (§6.4.2.1).
pub(super) fn irq(number: u8) -> Encoded {
    const IRQ_DESCRIPTOR_2_BYTES: u8 = 0x22;
    let [low, high] = 1u16.checked_shl(number.into()).unwrap_or(0).to_le_bytes();
    Encoded(vec![IRQ_DESCRIPTOR_2_BYTES, low, high])
}
