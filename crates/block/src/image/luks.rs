//! Encrypted images: LUKS 1 ("LUKS On-Disk Format Specification 1.2.3"), as qemu-img and cryptsetup make them, with AES in XTS mode.
//!
//! Ciphers and hashes are RustCrypto's. A passphrase opens one of eight key slots; what is in it is the key of the disk, spread over
//! many stripes so that it can be destroyed. Sectors are 512 bytes, each with its number as the tweak.

use std::io;
use std::path::Path;

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use vm_memory::VolatileSlice;
use xts_mode::{Xts128, get_tweak_default};
use zeroize::Zeroizing;

use super::fault::{Fault, invalid, unsupported};
use super::raw::RawImage;
use super::{Image, Place, write_zero_bytes};
use crate::{OpenError, Secret};

const SECTOR: u64 = 512;
/// How a file begins, before its version.
const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const HEADER_BYTES: usize = 592;
/// Key slots: how many, where, how long, and how one that is in use begins.
const SLOTS: usize = 8;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const SLOT_IN_USE: u32 = 0x00ac_71f3;
/// The most work that a header may make us do: rounds of PBKDF2 for one slot, which take minutes.
const MAX_ROUNDS: u32 = 100_000_000;
/// Key and stripes of one slot.
const MAX_SLOT_DATA: u64 = 4 << 20;
/// Worked on at a time.
const PIECE_BYTES: usize = 256 << 10;

/// The hash that a header asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    fn digest(self, number: u32, data: &[u8]) -> Vec<u8> {
        fn digest<D: Digest>(number: u32, data: &[u8]) -> Vec<u8> {
            D::new().chain_update(number.to_be_bytes()).chain_update(data).finalize().to_vec()
        }
        match self {
            Hash::Sha1 => digest::<Sha1>(number, data),
            Hash::Sha256 => digest::<Sha256>(number, data),
            Hash::Sha512 => digest::<Sha512>(number, data),
        }
    }

    fn len(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// PBKDF2.
    fn derive(self, secret: &[u8], salt: &[u8], rounds: u32, key: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, rounds, key),
            Hash::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, rounds, key),
            Hash::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, rounds, key),
        }
    }

    /// Spreads each bit over as much as a digest has (§2.4 of the specification, `H1`).
    fn diffuse(self, data: &mut [u8]) {
        for (number, chunk) in data.chunks_mut(self.len()).enumerate() {
            let digest = Zeroizing::new(self.digest(number as u32, chunk));
            chunk.copy_from_slice(&digest[..chunk.len()]);
        }
    }
}

/// A key of a disk, ready for use.
enum Cipher {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

impl Cipher {
    /// From a key, half of which is for the data and half for the tweaks.
    fn new(key: &[u8]) -> Option<Cipher> {
        let (data, tweak) = key.split_at(key.len() / 2);
        Some(match key.len() {
            32 => Cipher::Aes128(Box::new(Xts128::new(
                Aes128::new_from_slice(data).ok()?,
                Aes128::new_from_slice(tweak).ok()?,
            ))),
            64 => Cipher::Aes256(Box::new(Xts128::new(
                Aes256::new_from_slice(data).ok()?,
                Aes256::new_from_slice(tweak).ok()?,
            ))),
            _ => return None,
        })
    }

    /// Works on whole sectors, of which the first has this number.
    fn encrypt(&self, bytes: &mut [u8], sector: u64) {
        match self {
            Cipher::Aes128(xts) => xts.encrypt_area(bytes, SECTOR as usize, sector.into(), get_tweak_default),
            Cipher::Aes256(xts) => xts.encrypt_area(bytes, SECTOR as usize, sector.into(), get_tweak_default),
        }
    }

    fn decrypt(&self, bytes: &mut [u8], sector: u64) {
        match self {
            Cipher::Aes128(xts) => xts.decrypt_area(bytes, SECTOR as usize, sector.into(), get_tweak_default),
            Cipher::Aes256(xts) => xts.decrypt_area(bytes, SECTOR as usize, sector.into(), get_tweak_default),
        }
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// A text that zeros follow.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).chars().filter(|c| !c.is_control()).collect()
}

/// Opens an image with a passphrase: the key, and where the disk begins in the file.
fn unlock(file: &RawImage, secret: &Secret) -> Result<(Cipher, u64), Fault> {
    let mut header = [0; HEADER_BYTES];
    file.read_bytes(0, &mut header)?;
    if !header.starts_with(MAGIC) {
        return invalid("it does not begin as such an image does");
    }
    let version = u16::from_be_bytes([header[6], header[7]]);
    if version != 1 {
        let reason = format!(
            "is encrypted with LUKS version {version}; only version 1 is supported: open it with cryptsetup"
        );
        return Err(Fault::Unsupported(reason));
    }
    let (cipher, mode, hash) = (text(&header[8..40]), text(&header[40..72]), text(&header[72..104]));
    let key_bytes = be32(&header, 108) as usize;
    let hash = match hash.as_str() {
        "sha1" => Hash::Sha1,
        "sha256" => Hash::Sha256,
        "sha512" => Hash::Sha512,
        other => {
            return Err(Fault::Unsupported(format!(
                "is encrypted with the hash {other}, which is not supported"
            )));
        }
    };
    if cipher != "aes" || mode != "xts-plain64" || ![32, 64].contains(&key_bytes) {
        let reason = format!(
            "is encrypted with {cipher}-{mode}, keys of {key_bytes} bytes; only aes-xts-plain64 is supported"
        );
        return Err(Fault::Unsupported(reason));
    }
    let start = u64::from(be32(&header, 104)) * SECTOR;
    if start < HEADER_BYTES as u64 || start >= file.size() {
        return invalid("the encrypted disk does not begin within the file");
    }
    for slot in header[SLOTS_AT..].chunks_exact(SLOT_BYTES).take(SLOTS) {
        if be32(slot, 0) != SLOT_IN_USE {
            continue;
        }
        let (rounds, at, stripes) =
            (be32(slot, 4), u64::from(be32(slot, 40)) * SECTOR, u64::from(be32(slot, 44)));
        let len = stripes.saturating_mul(key_bytes as u64);
        if stripes == 0 || len > MAX_SLOT_DATA || at + len > start || rounds == 0 || rounds > MAX_ROUNDS {
            return invalid("a key slot is not possible");
        }
        let mut slot_key = Zeroizing::new(vec![0; key_bytes]);
        hash.derive(secret.bytes(), &slot[8..40], rounds, &mut slot_key);
        let mut material = Zeroizing::new(vec![0; len.next_multiple_of(SECTOR) as usize]);
        file.read_bytes(at, &mut material)?;
        let Some(cipher) = Cipher::new(&slot_key) else {
            return invalid("a key has no possible length");
        };
        cipher.decrypt(&mut material, 0);
        let key = merge(hash, &material[..len as usize], key_bytes);
        let digest_rounds = be32(&header, 164);
        if digest_rounds == 0 || digest_rounds > MAX_ROUNDS {
            return invalid("the digest of its key is not possible");
        }
        let mut digest = [0; 20];
        hash.derive(&key, &header[132..164], digest_rounds, &mut digest);
        if digest == header[112..132] {
            let cipher =
                Cipher::new(&key).ok_or_else(|| Fault::Invalid("a key has no possible length".into()))?;
            return Ok((cipher, start));
        }
    }
    Err(Fault::Unsupported(
        "is encrypted, and the passphrase opens none of its key slots; give the right one".into(),
    ))
}

/// Puts a key together from its stripes (§2.4, `AFmerge`).
fn merge(hash: Hash, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    let count = stripes.len() / key_bytes;
    for (number, stripe) in stripes.chunks_exact(key_bytes).enumerate() {
        key.iter_mut().zip(stripe).for_each(|(key, stripe)| *key ^= stripe);
        if number + 1 < count {
            hash.diffuse(&mut key);
        }
    }
    key
}

/// An encrypted image.
pub struct LuksImage {
    file: RawImage,
    cipher: Cipher,
    /// Where the disk begins in the file, in bytes.
    start: u64,
}

impl LuksImage {
    /// The image in `file`, which is at `path`.
    pub(crate) fn open(file: RawImage, path: &Path, secret: Option<&Secret>) -> Result<Self, OpenError> {
        let unlocked = match secret {
            Some(secret) => unlock(&file, secret),
            None => unsupported("is encrypted; give the file of its passphrase with keyfile=FILE"),
        };
        let (cipher, start) = unlocked.map_err(|fault| fault.of(path, "luks"))?;
        Ok(LuksImage { file, cipher, start })
    }

    /// Has pieces of a range done: the offset on the disk, and memory of as many bytes.
    fn pieces(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
        mut piece: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        let mut memory = vec![0; len.min(PIECE_BYTES)];
        let mut done = 0;
        while done < len {
            let now = (len - done).min(PIECE_BYTES);
            piece(offset + done as u64, &mut memory[..now])?;
            done += now;
        }
        Ok(())
    }
}

impl Image for LuksImage {
    fn size(&self) -> u64 {
        self.file.size().saturating_sub(self.start) / SECTOR * SECTOR
    }

    fn sectors(&self) -> (u32, u32) {
        self.file.sectors()
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut place = Place::new(buffers);
        self.pieces(offset, buffers, |offset, bytes| {
            self.file.read(self.start + offset, &[VolatileSlice::from(&mut *bytes)])?;
            self.cipher.decrypt(bytes, offset / SECTOR);
            place.fill(bytes);
            Ok(())
        })
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        let mut place = Place::new(buffers);
        self.pieces(offset, buffers, |offset, bytes| {
            place.take(bytes);
            self.cipher.encrypt(bytes, offset / SECTOR);
            self.file.write(self.start + offset, &[VolatileSlice::from(bytes)], stable)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(self.start + offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        write_zero_bytes(self, offset, len)
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        // What is new would not read as zeros but as what zeros decrypt to.
        let old = self.size();
        self.file.resize(self.start + len)?;
        if len > old { write_zero_bytes(self, old, len - old) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{have_qemu, options, read, scratch, tool, write};
    use crate::{DiskOptions, Format, open_image};

    fn with(path: &Path, secret: &str) -> DiskOptions {
        DiskOptions { format: Some(Format::Luks), secret: Some(Secret::new(secret.into())), ..options(path) }
    }

    #[test]
    fn what_we_write_qemu_reads_and_the_other_way_round() {
        if !have_qemu() {
            return;
        }
        for extra in ["cipher-alg=aes-256", "cipher-alg=aes-128,hash-alg=sha1", "hash-alg=sha512"] {
            let directory = scratch();
            let path = directory.path().join("image");
            let name = path.to_str().unwrap();
            let option = format!("key-secret=s,iter-time=10,{extra}");
            let secret = ["--object", "secret,id=s,data=open sesame"];
            tool(
                "qemu-img",
                &[&["create", "-q"], &secret[..], &["-f", "luks", "-o", &option, name, "4M"]].concat(),
            );
            let target = format!("driver=luks,key-secret=s,file.filename={name}");
            let qemu_io = |command: &str| {
                let output =
                    tool("qemu-io", &[&secret[..], &["--image-opts", &target, "-c", command]].concat());
                assert!(!output.contains("failed"), "{output}");
            };
            qemu_io("write -P 0x11 1M 100k");
            let image = open_image(&with(&path, "open sesame")).unwrap();
            assert_eq!(image.size(), 4 << 20, "{extra}");
            assert_eq!(read(&*image, 1 << 20, 102_400), vec![0x11; 102_400]);
            write(&*image, 512, &[0x22; 1024]);
            write(&*image, 2 << 20, &vec![0x33; 1 << 20]);
            image.write_zeroes(3 << 20, 4096, true).unwrap();
            image.flush().unwrap();
            drop(image);
            for command in
                ["read -P 0x22 512 1k", "read -P 0x33 2M 1M", "read -P 0 3M 4k", "read -P 0x11 1M 100k"]
            {
                qemu_io(command);
            }
            assert!(!fs::read(&path).unwrap().windows(512).any(|bytes| bytes == [0x33; 512]), "in the clear");
            let image = open_image(&with(&path, "open sesame")).unwrap();
            image.resize(5 << 20).unwrap();
            assert_eq!(read(&*image, 4 << 20, 512), [0; 512]);
            drop(image);
            let refusal = |options: &DiskOptions| open_image(options).err().unwrap().to_string();
            assert!(refusal(&with(&path, "open barley")).contains("opens none"));
            assert!(refusal(&DiskOptions { secret: None, ..with(&path, "") }).contains("keyfile=FILE"));
            if extra != "cipher-alg=aes-256" {
                // Once is enough: each takes the time of a passphrase.
                continue;
            }
            let good = fs::read(&path).unwrap();
            for (at, bytes, expected) in [
                (7, &[2][..], "version 2"),
                (8, b"serpent", "serpent-xts-plain64"),
                (40, b"cbc-essiv", "aes-cbc-essiv"),
                (72, b"ripemd160", "ripemd160"),
                (104, &[0xff; 4], "within the file"),
                (108, &[0xff; 4], "4294967295 bytes"),
                (212, &[0xff; 4], "slot is not possible"),
                (248, &[0xff; 4], "slot is not possible"),
                (252, &[0xff; 4], "slot is not possible"),
                (252, &[0; 4], "slot is not possible"),
                (164, &[0xff; 4], "digest"),
                (0, b"X", "not a valid luks image"),
            ] {
                let mut patched = good.clone();
                patched[at..at + bytes.len()].copy_from_slice(bytes);
                fs::write(&path, patched).unwrap();
                let line = refusal(&with(&path, "open sesame"));
                assert!(line.contains(expected), "{at}: {line}");
            }
        }
    }

    #[test]
    fn secrets_are_not_told() {
        let told = format!("{:?}", with(Path::new("x"), "hush"));
        assert!(!told.contains("hush") && !told.contains("104"), "{told}");
    }
}
