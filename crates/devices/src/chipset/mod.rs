//! The chips of a PC's south bridge, where bhyve has them.

pub mod acpi_pm;
pub mod hpet;
pub mod i8042;
pub mod post;
pub mod reset;
pub mod rtc;

pub use acpi_pm::AcpiPm;
pub use hpet::{Hpet, HpetConfig, HpetLines};
pub use i8042::I8042;
pub use post::PostCode;
pub use reset::{ResetControl, SystemControlPortA};
pub use rtc::{Rtc, RtcConfig};
