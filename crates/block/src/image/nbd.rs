//! A disk that an NBD server exports (the NBD protocol, `doc/proto.md` of NBD; URLs by `doc/uri.md`): fixed newstyle handshake, simple
//! replies, one connection.
//!
//! Requests of several threads are on their way together; a thread of the connection reads the replies. If the connection is lost,
//! what is on its way fails, which the disk's error policy takes up, and the next request tries to connect again. Writes that were done
//! and not flushed may have been lost with the server, so the first flush after that fails too.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::{Image, write_zero_bytes};
use crate::OpenError;

/// The port of NBD.
const PORT: u16 = 10809;
/// For connecting and for each answer of the handshake. Later a server may take as long as it wants.
const PATIENCE: Duration = Duration::from_secs(15);
/// Data of one request at most; longer ones go in pieces. Servers take 32 MiB at least.
const MAX_PIECE: u64 = 2 << 20;
/// Bytes of a discard or of zeroes at most.
const MAX_RANGE: u64 = 1 << 30;
/// Bytes of an answer of the handshake at most.
const MAX_ANSWER: u32 = 1 << 16;
/// Answers of the handshake at most.
const MAX_ANSWERS: usize = 64;

/// Numbers of the protocol, by its sections "Newstyle negotiation", "Option types", "Transmission phase".
mod bits {
    pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
    pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
    pub const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST_MAGIC: u32 = 0x2560_9513;
    pub const REPLY_MAGIC: u32 = 0x6744_6698;
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 2;
    pub const OPTION_EXPORT_NAME: u32 = 1;
    pub const OPTION_GO: u32 = 7;
    pub const ANSWER_ACK: u32 = 1;
    pub const ANSWER_INFO: u32 = 3;
    pub const ANSWER_ERROR: u32 = 1 << 31;
    pub const ERROR_UNSUPPORTED: u32 = ANSWER_ERROR + 1;
    pub const ERROR_TLS: u32 = ANSWER_ERROR + 5;
    pub const ERROR_UNKNOWN: u32 = ANSWER_ERROR + 6;
    pub const INFO_EXPORT: u16 = 0;
    pub const INFO_BLOCK_SIZE: u16 = 3;
    pub const EXPORT_READ_ONLY: u16 = 1 << 1;
    pub const EXPORT_FLUSH: u16 = 1 << 2;
    pub const EXPORT_FUA: u16 = 1 << 3;
    pub const EXPORT_TRIM: u16 = 1 << 5;
    pub const EXPORT_WRITE_ZEROES: u16 = 1 << 6;
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const FLAG_FUA: u16 = 1 << 0;
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
}

/// Where a server is and which of its disks is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    server: Server,
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl Address {
    /// Takes a URL apart.
    fn parse(url: &str) -> Result<Address, String> {
        let usage = "the URL of an NBD disk is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
        let Some((scheme, rest)) = url.split_once("://") else { return Err(usage.into()) };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).ok_or(usage)?;
        let server = match scheme {
            "nbd" => {
                let port = |text: &str| text.parse().map_err(|_| usage.to_owned());
                let (host, port) = match authority.strip_prefix('[') {
                    Some(rest) => match rest.split_once(']') {
                        Some((host, "")) => (host, PORT),
                        Some((host, after)) => (host, port(after.strip_prefix(':').ok_or(usage)?)?),
                        None => return Err(usage.into()),
                    },
                    None => match authority.split_once(':') {
                        Some((host, text)) => (host, port(text)?),
                        None => (authority, PORT),
                    },
                };
                Server::Tcp(
                    if host.is_empty() { "localhost".into() } else { decode(host).ok_or(usage)? },
                    port,
                )
            }
            "nbd+unix" => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                let path = socket.filter(|path| !path.is_empty()).and_then(decode).ok_or(usage)?;
                Server::Unix(path.into())
            }
            "nbds" | "nbds+unix" => {
                return Err("NBD with TLS is not supported; use a tunnel, ssh for example".into());
            }
            _ => return Err(usage.into()),
        };
        if export.len() > 4096 {
            return Err("the name of an NBD export has 4096 bytes at most".into());
        }
        Ok(Address { server, export })
    }
}

/// Undoes the percent encoding of URLs.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = rest.get(2..)?;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

/// A connected socket.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(server: &Server) -> io::Result<Stream> {
        match server {
            Server::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            Server::Tcp(host, port) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, PATIENCE) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Stream::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.set_read_timeout(patience),
            Stream::Unix(stream) => stream.set_read_timeout(patience),
        }
    }

    fn try_clone(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
        })
    }

    fn shut_down(&self) {
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(buffer),
            Stream::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn protocol<T>(what: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, what.into()))
}

/// What the server says of the disk.
#[derive(Clone, Copy, Debug)]
struct Export {
    size: u64,
    flags: u16,
    /// Offsets and lengths are multiples of this, and best of this.
    least_block: u32,
    best_block: u32,
    /// Data of one request at most.
    most_data: u32,
}

/// Goes through the handshake up to the transmission phase.
fn handshake(stream: &mut Stream, name: &str) -> io::Result<Export> {
    if (stream.u64()?, stream.u64()?) != (bits::MAGIC, bits::OPTION_MAGIC) {
        return protocol("it does not speak the newstyle protocol of NBD");
    }
    let flags = stream.u16()?;
    if flags & bits::FIXED_NEWSTYLE == 0 {
        return protocol("it does not speak the fixed newstyle protocol of NBD");
    }
    let no_zeroes = flags & bits::NO_ZEROES;
    stream.write_all(&u32::from(bits::FIXED_NEWSTYLE | no_zeroes).to_be_bytes())?;
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.bytes());
    data.extend([1u16, bits::INFO_BLOCK_SIZE].into_iter().flat_map(u16::to_be_bytes));
    send_option(stream, bits::OPTION_GO, &data)?;
    let mut export = Export { size: 0, flags: 0, least_block: 1, best_block: 4096, most_data: u32::MAX };
    let mut known = false;
    for _ in 0..MAX_ANSWERS {
        if (stream.u64()?, stream.u32()?) != (bits::ANSWER_MAGIC, bits::OPTION_GO) {
            return protocol("it answers something else than it was asked");
        }
        let (kind, len) = (stream.u32()?, stream.u32()?);
        if len > MAX_ANSWER {
            return protocol("its answer is too long");
        }
        let mut answer = vec![0; len as usize];
        stream.read_exact(&mut answer)?;
        let number = |at: usize, len: usize| -> u64 {
            answer
                .get(at..at + len)
                .unwrap_or_default()
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        match kind {
            bits::ANSWER_ACK if known => return Ok(export),
            bits::ANSWER_ACK => return protocol("it does not say how large the disk is"),
            bits::ANSWER_INFO if len >= 12 && number(0, 2) == u64::from(bits::INFO_EXPORT) => {
                (export.size, export.flags, known) = (number(2, 8), number(10, 2) as u16, true);
            }
            bits::ANSWER_INFO if len >= 14 && number(0, 2) == u64::from(bits::INFO_BLOCK_SIZE) => {
                let [least, best, most] =
                    [number(2, 4), number(6, 4), number(10, 4)].map(|value| value as u32);
                if !least.is_power_of_two() || least > 65536 || !best.is_power_of_two() || most < least {
                    return protocol("its block sizes are not possible");
                }
                (export.least_block, export.best_block, export.most_data) = (least, best.max(least), most);
            }
            bits::ANSWER_INFO => {}
            bits::ERROR_UNSUPPORTED => return by_name(stream, name, no_zeroes != 0),
            bits::ERROR_TLS => return protocol("it wants TLS, which is not supported"),
            bits::ERROR_UNKNOWN => return protocol(format!("it has no export named {name:?}")),
            error if error & bits::ANSWER_ERROR != 0 => {
                let message =
                    String::from_utf8_lossy(&answer).chars().filter(|c| !c.is_control()).collect::<String>();
                return protocol(format!(
                    "it refuses the export {name:?} (error {}): {message}",
                    error & 0xffff
                ));
            }
            _ => {}
        }
    }
    protocol("it does not come to an end with its answers")
}

/// The way of old servers.
fn by_name(stream: &mut Stream, name: &str, no_zeroes: bool) -> io::Result<Export> {
    send_option(stream, bits::OPTION_EXPORT_NAME, name.as_bytes())?;
    let (size, flags) = (stream.u64()?, stream.u16()?);
    if !no_zeroes {
        stream.array::<124>()?;
    }
    Ok(Export { size, flags, least_block: 1, best_block: 4096, most_data: u32::MAX })
}

fn send_option(stream: &mut Stream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = bits::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)
}

/// Who waits for a reply: how much data comes with it, and where it goes.
struct Waiting {
    data: usize,
    reply: Sender<io::Result<Vec<u8>>>,
}

/// A connection in its transmission phase.
struct Connection {
    export: Export,
    writer: Mutex<Stream>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    broken: AtomicBool,
    cookie: AtomicU64,
}

impl Connection {
    fn open(address: &Address) -> io::Result<Arc<Connection>> {
        let mut stream = Stream::connect(&address.server)?;
        stream.set_patience(Some(PATIENCE))?;
        let export = handshake(&mut stream, &address.export)?;
        stream.set_patience(None)?;
        let reader = stream.try_clone()?;
        let connection = Arc::new(Connection {
            export,
            writer: Mutex::new(stream),
            waiting: Mutex::default(),
            broken: AtomicBool::new(false),
            cookie: AtomicU64::new(1),
        });
        let of_reader = Arc::downgrade(&connection);
        thread::Builder::new().name("nbd".into()).spawn(move || {
            let mut reader = reader;
            // The connection ends when its last user goes, which shuts the socket down.
            while let Some(connection) = next_reply(&mut reader, &of_reader) {
                drop(connection);
            }
        })?;
        Ok(connection)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing comes any more: whoever waits is told.
    fn fail(&self, reason: &io::Error) {
        self.broken.store(true, Ordering::Release);
        let waiting = std::mem::take(&mut *self.waiting());
        for who in waiting.into_values() {
            let _ = who
                .reply
                .send(Err(io::Error::new(reason.kind(), format!("the NBD server is gone: {reason}"))));
        }
    }

    /// Sends a request and waits for its reply. `data` goes with it, `expected` bytes come back.
    fn request(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
        expected: usize,
    ) -> io::Result<Vec<u8>> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let mut bytes = bits::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        let (reply, answered) = channel();
        self.waiting().insert(cookie, Waiting { data: expected, reply });
        // Only after that: `fail` either finds it in the list or has set this.
        if self.broken.load(Ordering::Acquire) {
            self.waiting().remove(&cookie);
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let sent = {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.write_all(&bytes).inspect_err(|_| writer.shut_down())
        };
        if let Err(error) = sent {
            self.fail(&error);
        }
        answered.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = bits::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, bits::DISCONNECT].into_iter().flat_map(u16::to_be_bytes));
        bytes.extend([0; 20]);
        let _ = writer.write_all(&bytes);
        writer.shut_down();
    }
}

/// Reads a reply and gives it to who waits for it. `None` at the end.
fn next_reply(reader: &mut Stream, connection: &std::sync::Weak<Connection>) -> Option<Arc<Connection>> {
    let mut read = || -> io::Result<Option<Arc<Connection>>> {
        let magic = reader.u32()?;
        if magic != bits::REPLY_MAGIC {
            return protocol("it sends no reply where one has to be");
        }
        let (error, cookie) = (reader.u32()?, reader.u64()?);
        let Some(connection) = connection.upgrade() else { return Ok(None) };
        let Some(Waiting { data, reply }) = connection.waiting().remove(&cookie) else {
            return protocol("it replies to what it was not asked");
        };
        if error != 0 {
            let _ = reply.send(Err(server_error(error)));
            return Ok(Some(connection));
        }
        let mut bytes = vec![0; data];
        let result = reader.read_exact(&mut bytes);
        let failed = result.as_ref().err().map(|error| io::Error::new(error.kind(), error.to_string()));
        let _ = reply.send(result.map(|()| bytes));
        failed.map_or(Ok(Some(connection)), Err)
    };
    match read() {
        Ok(connection) => connection,
        Err(error) => {
            if let Some(connection) = connection.upgrade() {
                connection.fail(&error);
            }
            reader.shut_down();
            None
        }
    }
}

/// The errors of the protocol are those of Linux.
fn server_error(code: u32) -> io::Error {
    match code {
        1 => io::ErrorKind::ReadOnlyFilesystem.into(),
        28 => io::ErrorKind::StorageFull.into(),
        95 => io::ErrorKind::Unsupported.into(),
        _ => {
            let text = i32::try_from(code).map(io::Error::from_raw_os_error).map(|e| e.to_string());
            io::Error::other(format!("the NBD server says: {}", text.unwrap_or_else(|_| code.to_string())))
        }
    }
}

/// A disk at an NBD server.
pub struct NbdImage {
    address: Address,
    export: Export,
    current: Mutex<Option<Arc<Connection>>>,
    /// Something was written since the last flush.
    unflushed: AtomicBool,
    /// The connection was lost with something unflushed.
    lost: AtomicBool,
}

impl NbdImage {
    /// Connects to the disk at a URL.
    ///
    /// # Errors
    /// The URL is not one, the server does not answer or has no such disk, or does not let it be written.
    pub fn open(url: &str, writable: bool) -> Result<NbdImage, OpenError> {
        let path = PathBuf::from(url);
        let unsupported = |reason: String| OpenError::Unsupported { path: path.clone(), reason };
        let address = Address::parse(url).map_err(unsupported)?;
        let connection = Connection::open(&address).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => unsupported(format!("the server cannot be used: {error}")),
            _ => unsupported(format!("the server does not answer: {error}; is it running there?")),
        })?;
        let export = connection.export;
        let sector = u64::from(export.least_block.max(512));
        if export.size == 0 || !export.size.is_multiple_of(sector) {
            return Err(unsupported(format!(
                "the server's disk has {} bytes, which is not whole sectors",
                export.size
            )));
        }
        if writable && export.flags & bits::EXPORT_READ_ONLY != 0 {
            return Err(unsupported("the server exports it read-only; attach it with the option ro".into()));
        }
        Ok(NbdImage {
            address,
            export,
            current: Mutex::new(Some(connection)),
            unflushed: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        })
    }

    fn connection(&self) -> io::Result<Arc<Connection>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) =
            current.as_ref().filter(|connection| !connection.broken.load(Ordering::Acquire))
        {
            return Ok(connection.clone());
        }
        if current.take().is_some() && self.unflushed.swap(false, Ordering::AcqRel) {
            self.lost.store(true, Ordering::Release);
        }
        let connection = Connection::open(&self.address)?;
        let (old, new) = (self.export, connection.export);
        if (new.size, new.flags, new.least_block) != (old.size, old.flags, old.least_block) {
            return Err(io::Error::other("the NBD server has another disk than before"));
        }
        tracing::warn!("connected to the NBD server again");
        *current = Some(connection.clone());
        Ok(connection)
    }

    fn has(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }

    /// Has pieces of a range done, each at most `most` bytes.
    fn pieces(
        &self,
        offset: u64,
        len: u64,
        most: u64,
        mut piece: impl FnMut(u64, u32) -> io::Result<()>,
    ) -> io::Result<()> {
        let block = u64::from(self.export.least_block);
        let most = (most / block * block).max(block);
        let mut done = 0;
        while done < len {
            let now = most.min(len - done);
            piece(offset + done, now as u32)?;
            done += now;
        }
        Ok(())
    }

    /// A request that changes a range and has no data.
    fn change(&self, kind: u16, flags: u16, offset: u64, len: u64) -> io::Result<()> {
        let connection = self.connection()?;
        self.unflushed.store(true, Ordering::Release);
        self.pieces(offset, len, MAX_RANGE, |offset, len| {
            connection.request(kind, flags, offset, len, &[], 0).map(|_| ())
        })
    }
}

impl Image for NbdImage {
    fn size(&self) -> u64 {
        self.export.size
    }

    fn sectors(&self) -> (u32, u32) {
        let logical = self.export.least_block.max(512);
        (logical, self.export.best_block.clamp(logical, 65536.max(logical)))
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let connection = self.connection()?;
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let mut place = super::Place::new(buffers);
        self.pieces(offset, len, MAX_PIECE.min(u64::from(self.export.most_data)), |offset, len| {
            let bytes = connection.request(bits::READ, 0, offset, len, &[], len as usize)?;
            place.fill(&bytes);
            Ok(())
        })
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        let connection = self.connection()?;
        let fua = stable && self.has(bits::EXPORT_FUA);
        if !fua {
            self.unflushed.store(true, Ordering::Release);
        }
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let mut place = super::Place::new(buffers);
        let flags = if fua { bits::FLAG_FUA } else { 0 };
        self.pieces(offset, len, MAX_PIECE.min(u64::from(self.export.most_data)), |offset, len| {
            let mut bytes = vec![0; len as usize];
            place.take(&mut bytes);
            connection.request(bits::WRITE, flags, offset, len, &bytes, 0).map(|_| ())
        })?;
        if stable && !fua { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        let connection = self.connection()?;
        if self.lost.swap(false, Ordering::AcqRel) {
            return Err(io::Error::other(
                "the NBD server was gone for a while; what was written before may be lost",
            ));
        }
        // What is written from here on is for the next flush; if this one fails, all is.
        let unflushed = self.unflushed.swap(false, Ordering::AcqRel);
        if !self.has(bits::EXPORT_FLUSH) {
            return Ok(());
        }
        let result = connection.request(bits::FLUSH, 0, 0, 0, &[], 0);
        if result.is_err() && unflushed {
            self.unflushed.store(true, Ordering::Release);
        }
        result.map(|_| ())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.has(bits::EXPORT_TRIM) {
            return Ok(());
        }
        match self.change(bits::TRIM, 0, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if !self.has(bits::EXPORT_WRITE_ZEROES) {
            return write_zero_bytes(self, offset, len);
        }
        let flags = if unmap { 0 } else { bits::FLAG_NO_HOLE };
        match self.change(bits::WRITE_ZEROES, flags, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zero_bytes(self, offset, len),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests;
