//! Where `libpollen_gloo.so`, NCCL and the CUDA driver are looked for.

use std::path::{Path, PathBuf};

use crate::nccl::Places;

const FILE: &str = "libpollen_gloo.so";
const INSTALLED: &str = ".pollen/lib/libpollen_gloo.so";

/// Everything the search depends on.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    /// From the configuration; empty: not given.
    pub(crate) configured: PathBuf,
    /// `POLLEN_GLOO_LIBRARY`.
    pub(crate) environment: Option<PathBuf>,
    pub(crate) current_dir: Option<PathBuf>,
    pub(crate) executable: Option<PathBuf>,
}

impl Surroundings {
    /// Looks at this process.
    pub(crate) fn of_this_process(configured: &Path) -> Self {
        Self {
            configured: configured.to_owned(),
            environment: std::env::var_os("POLLEN_GLOO_LIBRARY").map(PathBuf::from),
            current_dir: std::env::current_dir().ok(),
            executable: std::env::current_exe().ok(),
        }
    }

    /// Returns the places to try, in order. A path that was given explicitly is the only one.
    pub(crate) fn candidates(&self) -> Vec<PathBuf> {
        if !self.configured.as_os_str().is_empty() {
            return vec![self.configured.clone()];
        }
        if let Some(path) = self
            .environment
            .as_ref()
            .filter(|p| !p.as_os_str().is_empty())
        {
            return vec![path.clone()];
        }
        let mut places: Vec<PathBuf> = Vec::new();
        let below_current = self.current_dir.iter().flat_map(|dir| dir.ancestors());
        places.extend(below_current.map(|dir| dir.join(INSTALLED)));
        let near_executable = self
            .executable
            .iter()
            .flat_map(|exe| exe.ancestors().skip(1));
        for dir in near_executable.take(3) {
            places.push(dir.join(FILE));
            places.push(dir.join(INSTALLED));
        }
        places.push(PathBuf::from(FILE));
        let mut seen = std::collections::HashSet::new();
        places.retain(|place| seen.insert(place.clone()));
        places
    }
}

/// Returns where NCCL and the driver are looked for in this process.
pub(crate) fn nccl_places(configured: &Path) -> Places {
    let given = std::env::var_os("POLLEN_NCCL_LIBRARY").map(PathBuf::from);
    let prefix = |name| std::env::var_os(name).map(PathBuf::from);
    let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME"].map(prefix);
    Places {
        nccl: nccl_ladder(configured, given, prefixes.into_iter().flatten()),
        driver: ["libcuda.so.1", "libcuda.so"].map(PathBuf::from).into(),
    }
}

/// A path that was given explicitly is the only one. Else the system's library, then what Python
/// packages and CUDA toolkits bring; pip and NVIDIA's package know only the name with the 2.
fn nccl_ladder(
    configured: &Path,
    given: Option<PathBuf>,
    prefixes: impl Iterator<Item = PathBuf>,
) -> Vec<PathBuf> {
    if !configured.as_os_str().is_empty() {
        return vec![configured.to_owned()];
    }
    if let Some(path) = given.filter(|path| !path.as_os_str().is_empty()) {
        return vec![path];
    }
    let mut places: Vec<PathBuf> = ["libnccl.so.2", "libnccl.so"].map(PathBuf::from).into();
    for prefix in prefixes {
        let pythons = std::fs::read_dir(prefix.join("lib")).into_iter().flatten();
        let pythons = pythons.filter_map(|entry| Some(entry.ok()?.path()));
        places.extend(
            pythons
                .map(|python| python.join("site-packages/nvidia/nccl/lib/libnccl.so.2"))
                .filter(|path| path.exists()),
        );
        places.extend(["lib", "lib64"].map(|lib| prefix.join(lib).join("libnccl.so.2")));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_is_looked_for_by_its_names_then_in_packages() {
        let venv = tempfile::tempdir().expect("a folder");
        let package = "lib/python3.11/site-packages/nvidia/nccl/lib";
        std::fs::create_dir_all(venv.path().join(package)).expect("a folder");
        let library = venv.path().join(package).join("libnccl.so.2");
        std::fs::write(&library, "").expect("a file");
        let prefixes = || std::iter::once(venv.path().to_owned());
        let places = nccl_ladder(Path::new(""), None, prefixes());
        assert_eq!(places[0], Path::new("libnccl.so.2"));
        assert_eq!(places[1], Path::new("libnccl.so"));
        assert!(places.contains(&library), "{places:?}");
        assert!(places.contains(&venv.path().join("lib64/libnccl.so.2")));
        let given = Some(PathBuf::from("/env.so"));
        assert_eq!(
            nccl_ladder(Path::new(""), given.clone(), prefixes()),
            [PathBuf::from("/env.so")]
        );
        assert_eq!(
            nccl_ladder(Path::new("/config.so"), given, prefixes()),
            [PathBuf::from("/config.so")]
        );
    }

    #[test]
    fn the_ladder_goes_from_explicit_to_near_to_system() {
        let mut around = Surroundings {
            current_dir: Some("/home/me/pollen/collectives".into()),
            executable: Some("/opt/pollen/bin/pollen".into()),
            ..Surroundings::default()
        };
        let places = around.candidates();
        let position = |path: &str| places.iter().position(|place| place == Path::new(path));
        let order = [
            position("/home/me/pollen/collectives/.pollen/lib/libpollen_gloo.so"),
            position("/home/me/pollen/.pollen/lib/libpollen_gloo.so"),
            position("/opt/pollen/bin/libpollen_gloo.so"),
            position("/opt/pollen/.pollen/lib/libpollen_gloo.so"),
            position("/opt/libpollen_gloo.so"),
            Some(places.len() - 1),
        ];
        assert!(order.iter().all(Option::is_some), "{places:?}");
        assert!(order.is_sorted(), "{places:?}");
        assert_eq!(places.last(), Some(&PathBuf::from(FILE)));

        around.environment = Some("/env.so".into());
        assert_eq!(around.candidates(), [PathBuf::from("/env.so")]);
        around.configured = "/config.so".into();
        assert_eq!(around.candidates(), [PathBuf::from("/config.so")]);
    }
}
