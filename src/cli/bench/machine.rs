//! Resources that a process uses, and the process behind a port, as far as Linux shows them.
//!
//! A value that can't be found is `None`; none is estimated. The crate procfs reads the same files, but
//! doesn't compile on other systems, where `dtc bench` only lacks these values.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _},
    path::Path,
    time::Duration,
};

/// How many clock ticks per second `/proc/PID/stat` counts: the same on every Linux in use.
const TICKS_PER_SECOND: u64 = 100;

/// How long a broker may take to send its greeting.
const GREETING: Duration = Duration::from_secs(5);

/// How many cores this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The processor's name.
pub(super) fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// How much CPU time the process has used.
pub(super) fn cpu(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Before it is the program's name in parentheses, which may contain anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 1000 / TICKS_PER_SECOND))
}

/// The process's resident memory, in bytes.
pub(super) fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The process that listens at this port of this machine, if this process may see it.
pub(super) fn listener(host: &str, port: u16) -> Option<u32> {
    let mut addresses = (host, port).to_socket_addrs().ok()?;
    addresses.find(|address| is_here(address.ip()))?;
    let sockets: BTreeSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .flat_map(|it| listening(it, port))
        .collect();
    let processes = fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid| has_one_of(*pid, &sockets))
}

fn is_here(address: IpAddr) -> bool {
    // An address that can be bound to is one of this machine.
    address.is_loopback() || std::net::UdpSocket::bind(SocketAddr::new(address, 0)).is_ok()
}

/// The inodes of the sockets that listen at `port`.
fn listening(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string(table).unwrap_or_default();
    let own = format!(":{port:04X}");
    let rows = table.lines().skip(1).map(|row| row.split_ascii_whitespace().collect::<Vec<_>>());
    rows.filter(|row| {
        row.get(1).is_some_and(|local| local.ends_with(&own))
            && row.get(3).is_some_and(|state| *state == LISTEN)
    })
    .filter_map(|row| row.get(9).map(|inode| format!("socket:[{inode}]")))
    .collect()
}

fn has_one_of(pid: u32, sockets: &BTreeSet<String>) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.filter_map(|file| fs::read_link(file.ok()?.path()).ok()).any(
        |file: std::path::PathBuf| Path::to_str(&file).is_some_and(|file| sockets.contains(file)),
    )
}

/// The version in the greeting of a broker, if it speaks without TLS.
pub(super) fn version(host: &str, port: u16) -> Option<String> {
    let address = (host, port).to_socket_addrs().ok()?.next()?;
    let mut stream = TcpStream::connect_timeout(&address, GREETING).ok()?;
    stream.set_read_timeout(Some(GREETING)).ok()?;
    stream.write_all(b"AMQP\x00\x00\x09\x01").ok()?;
    let mut greeting = vec![0; 4096];
    let mut length = 0;
    loop {
        let read = stream.read(greeting.get_mut(length..)?).ok().filter(|read| *read > 0)?;
        length += read;
        if let Some(version) = version_in(greeting.get(..length)?) {
            return Some(version);
        }
    }
}

/// The field `version`, a long string, in the table of `Connection.Start`.
fn version_in(greeting: &[u8]) -> Option<String> {
    const FIELD: &[u8] = b"\x07versionS";
    let at = greeting.windows(FIELD.len()).position(|window| window == FIELD)? + FIELD.len();
    let length = u32::from_be_bytes(greeting.get(at..at + 4)?.try_into().ok()?);
    let text = greeting.get(at + 4..at + 4 + usize::try_from(length).ok()?)?;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, process};

    use super::{cpu, listener, resident, version_in};

    #[test]
    fn a_process_finds_itself_by_its_port() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(listener("127.0.0.1", port), Some(process::id()));
        drop(socket);
        assert_eq!(listener("127.0.0.1", port), None);
    }

    #[test]
    fn the_resources_of_an_absent_process_are_unknown() {
        assert!(resident(process::id()).is_some_and(|bytes| bytes > 1 << 20));
        assert!(cpu(process::id()).is_some());
        assert_eq!((cpu(u32::MAX), resident(u32::MAX)), (None, None));
    }

    #[test]
    fn the_version_is_read_when_all_of_it_is_there() {
        let greeting = b"....\x07versionS\x00\x00\x00\x063.10.8\x08platformS";
        assert_eq!(version_in(greeting).as_deref(), Some("3.10.8"));
        assert_eq!(version_in(&greeting[..20]), None);
    }
}
