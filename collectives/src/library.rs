//! Where `libpollen_gloo.so` is looked for.

use std::path::{Path, PathBuf};

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

#[cfg(test)]
mod tests {
    use super::*;

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
