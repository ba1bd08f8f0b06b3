//! Where compiled and tuned GPU kernels are kept for the next process.

use std::ffi::OsString;
use std::path::PathBuf;

/// Names the folder, or with `off` keeps nothing.
pub const VARIABLE: &str = "POLLEN_KERNEL_CACHE";

/// Returns the folder: the one that [`VARIABLE`] names, else one of this machine's own in the user's
/// cache, because its database must not be shared by machines over a network file system.
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "GPUs alone have kernels")
)]
fn folder(variable: impl Fn(&str) -> Option<OsString>, host: &str) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    match set(VARIABLE) {
        Some(value) if value == "off" => None,
        Some(value) => Some(value.into()),
        None => {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || Some(PathBuf::from(set("HOME")?).join(".cache"));
            let cache = cache.or_else(home).unwrap_or_else(std::env::temp_dir);
            Some(cache.join("pollen").join("kernels").join(host))
        }
    }
}

/// Tells the kernel compiler where to keep things; call it before anything asks for a GPU. What the
/// user's own `cubecl.toml` says of other things still counts.
#[cfg(feature = "cuda")]
pub(crate) fn open() {
    use cubecl::config::cache::CacheConfig;
    use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

    let mut config = CubeClRuntimeConfig::from_current_dir();
    let folder = folder(
        |name| std::env::var_os(name),
        &pollen_collectives::host_name(),
    );
    config.compilation.cache = folder.is_some();
    config.autotune.disable_cache = folder.is_none();
    if let Some(folder) = folder {
        config.environment.path = CacheConfig::Directory(folder);
    }
    // The second call of a process finds the configuration set, which is fine.
    CubeClRuntimeConfig::try_set(config.override_from_env());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_has_a_folder_of_its_own_unless_told_otherwise() {
        let of = |set: &[(&str, &str)]| {
            let find = |name: &str| set.iter().find(|(key, _)| *key == name);
            folder(|name| find(name).map(|(_, value)| value.into()), "n3")
        };
        let home = ("HOME", "/home/me");
        for (set, want) in [
            (vec![home], Some("/home/me/.cache/pollen/kernels/n3")),
            (
                vec![home, ("XDG_CACHE_HOME", "/scratch")],
                Some("/scratch/pollen/kernels/n3"),
            ),
            (
                vec![home, (VARIABLE, "/fast/kernels")],
                Some("/fast/kernels"),
            ),
            (
                vec![home, (VARIABLE, "")],
                Some("/home/me/.cache/pollen/kernels/n3"),
            ),
            (vec![home, (VARIABLE, "off")], None),
        ] {
            assert_eq!(of(&set), want.map(PathBuf::from), "{set:?}");
        }
    }
}
