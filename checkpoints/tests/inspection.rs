//! What people ask of checkpoints: listing, verifying, comparing, deleting by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

mod places;

use places::{
    Damage, FLAT, Place, damage, everywhere, head, newest_step, save, weight, write_rank,
};
use pollen_checkpoints::{Change, CheckpointId, Error, State, diff};

#[test]
fn a_person_deletes_any_checkpoint_but_the_one_a_restart_needs() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        for step in [10, 20, 30] {
            save(&process, &claim, step).unwrap();
        }
        let id = |step| CheckpointId {
            step,
            generation: 1,
        };
        let hand = place.process();
        let refused = hand.remove(id(30)).unwrap_err();
        assert!(
            matches!(refused, Error::Protected { step: 30, .. }),
            "{refused}"
        );
        assert!(matches!(hand.remove(id(11)), Err(Error::Absent { .. })));
        hand.remove(id(10)).unwrap();
        // With the newest damaged, the one before it is what a restart needs.
        let file = "step-00000030/g1/optim-00001-of-00002.safetensors";
        damage(place, file, Damage::Flip);
        let refused = place.process().remove(id(20)).unwrap_err();
        assert!(
            matches!(refused, Error::Protected { step: 20, .. }),
            "{refused}"
        );
        place.process().remove(id(30)).unwrap();
        assert_eq!(newest_step(place), Some((20, 1)));
        let listed = hand.list().unwrap();
        assert_eq!(
            listed.len(),
            1,
            "no file of a deleted one is left: {listed:?}"
        );
        // The run goes on in the same process: nothing was taken over.
        save(&process, &claim, 40).unwrap();
        assert_eq!(newest_step(place), Some((40, 1)));
        damage(place, "step-00000040/g1/MANIFEST.json", Damage::Flip);
        damage(place, "step-00000020/g1/MANIFEST.json", Damage::Flip);
        let refused = place.process().remove(id(20)).unwrap_err();
        assert!(
            matches!(refused, Error::NothingVerifies { .. }),
            "{refused}"
        );
    });
}

#[test]
fn the_listing_says_what_each_folder_is() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        for step in [10, 20, 30] {
            save(&process, &claim, step).unwrap();
        }
        write_rank(&process, &claim, 40, 0, 2);
        process
            .remove(CheckpointId {
                step: 10,
                generation: 1,
            })
            .unwrap();
        place.put("step-00000010/g1/leftover.json", b"{}".to_vec());
        place.delete("step-00000020/g1/MANIFEST.json");
        let listed = place.process().list().unwrap();
        let states: Vec<(u64, State)> = listed.iter().map(|one| (one.id.step, one.state)).collect();
        let expected = [
            (10, State::Deleted),
            (20, State::Damaged),
            (30, State::Published),
            (40, State::Unpublished),
        ];
        assert_eq!(states, expected);
        let whole = place.process().verify(listed[2].id).unwrap().unwrap();
        assert_eq!(
            whole.manifest.bytes() + manifest_bytes(place, 30),
            listed[2].bytes
        );
        assert!(listed[2].modified.is_some());
        let reason = place.process().verify(listed[1].id).unwrap().unwrap_err();
        assert_eq!(reason, "MANIFEST.json is missing");
    });
}

fn manifest_bytes(place: &Place, step: u64) -> u64 {
    place.get(&format!("step-{step:08}/g1/MANIFEST.json")).len() as u64
}

#[test]
fn a_comparison_names_each_tensor_that_differs() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        save(&process, &claim, 10).unwrap();
        // The same content from one rank: `layer1.weight` is missing, the flat array is whole.
        let files = write_rank(&process, &claim, 20, 0, 1);
        process.publish(&claim, head(20, 1), files).unwrap();
        let open = |step| {
            let id = CheckpointId {
                step,
                generation: 1,
            };
            process.open(id).unwrap().unwrap()
        };
        let (a, b) = (open(10), open(20));
        let same = diff((&process, &a), (&process, &a)).unwrap();
        assert!(
            same.iter().all(|one| one.change == Change::None),
            "{same:?}"
        );
        let diffs = diff((&process, &a), (&process, &b)).unwrap();
        let names: Vec<&str> = diffs.iter().map(|one| &*one.name).collect();
        assert_eq!(names, ["layer0.weight", "layer1.weight", "optim:m"]);
        assert_eq!(diffs[1].change, Change::OnlyFirst);
        let Change::Values {
            changed,
            elements,
            max_abs,
            relative_l2,
        } = diffs[0].change
        else {
            panic!("{:?}", diffs[0])
        };
        assert_eq!((changed, elements, max_abs), (6, 6, 10.0));
        let norm: f64 = weight(10, 0).iter().map(|w| f64::from(*w).powi(2)).sum();
        assert!((relative_l2 - (600.0 / norm).sqrt()).abs() < 1e-12);
        let Change::Values {
            changed, max_abs, ..
        } = diffs[2].change
        else {
            panic!("{:?}", diffs[2])
        };
        assert_eq!((changed, max_abs), (FLAT, 10_000.0));
    });
}
