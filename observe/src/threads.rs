//! What the threads of a process are doing, as the kernel sees it: for processes that do not
//! answer. Reads `/proc` only, so it stops nothing and needs no signal; another process must
//! belong to the same user.

use std::fmt::Write as _;
use std::path::Path;

/// Returns one line for each thread of process `pid` on this machine: id, name, state, the kernel
/// function and system call it waits in, and the kernel stack where the kernel shows it (to root).
///
/// User-space frames need a debugger; the text says how.
pub fn threads_of(pid: u32) -> String {
    let folder = format!("/proc/{pid}/task");
    let mut ids: Vec<u32> = match std::fs::read_dir(&folder) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect(),
        Err(error) => return format!("process {pid}: {folder}: {error}\n"),
    };
    ids.sort_unstable();
    let mut text = format!("process {pid}, {} threads:\n", ids.len());
    for id in ids {
        let folder = Path::new(&folder).join(id.to_string());
        let read = |name: &str| {
            let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        let state = read("status")
            .lines()
            .find_map(|line| line.strip_prefix("State:"))
            .map_or_else(|| "gone".to_owned(), |state| state.trim().to_owned());
        let system_call = read("syscall");
        let number = system_call.split(' ').next().unwrap_or_default();
        let _ = writeln!(
            text,
            "  {id:>8} {:<16} {state:<14} in {} (system call {})",
            read("comm"),
            or_unknown(&read("wchan")),
            or_unknown(number),
        );
        for frame in read("stack").lines() {
            let _ = writeln!(text, "           {frame}");
        }
    }
    let _ = writeln!(
        text,
        "  user-space frames, while it lives: gdb -p {pid} -batch -ex 'thread apply all bt'"
    );
    text
}

fn or_unknown(text: &str) -> &str {
    match text {
        "" | "0" => "unknown",
        text => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_seen_to_be_stopped() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "kill -s STOP $$"])
            .spawn()
            .expect("a shell");
        let text = loop {
            let text = threads_of(child.id());
            if text.contains("T (stopped)") {
                break text;
            }
            assert!(text.contains("threads:"), "it has not ended: {text}");
            std::thread::yield_now();
        };
        assert!(text.contains(" sh "), "{text}");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }

    #[test]
    fn threads_have_their_names() {
        let (tell, hear) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("sleepy".into())
            .spawn(move || {
                let _ = ready.send(());
                hear.recv()
            })
            .expect("a thread");
        is_ready.recv().expect("it runs");
        let text = threads_of(std::process::id());
        assert!(text.contains(" sleepy "), "{text}");
        drop(tell);
        assert!(thread.join().expect("no panic").is_err());
        assert!(threads_of(0).contains("process 0: /proc/0/task"));
    }
}
