//! Processes from outside: signals, signs of life, waits for what they do.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::PATIENCE;

/// Sends a signal to one process.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Returns whether a process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z')
    })
}

/// Command lines of the processes that were told of a path, whoever started them.
pub fn processes_of(path: &Path) -> Vec<String> {
    let path = path.display().to_string();
    let lines = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&path)).collect()
}

/// Waits until `ready` returns something.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until a fault wrote its mark and returns the process id in it.
pub fn wait_for_mark(path: &Path) -> u32 {
    wait_for(&format!("the mark {}", path.display()), || {
        std::fs::read_to_string(path).ok()?.parse().ok()
    })
}
