//! What checkpoints promise, on every kind of store: memory, a folder, and the S3 server that
//! `POLLEN_TEST_S3_URL` (for example `s3://bucket/tests`) names.
#![allow(clippy::unwrap_used, reason = "tests")]

mod places;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use places::{
    Damage, FLAT, Place, damage, everywhere, flat, head, newest_step, save, weight, write_rank,
};
use pollen_checkpoints::{CheckpointId, Config, Error, FlatSlice, Values, Verify};
use pollen_core::ErrorClass;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};

#[test]
fn what_was_published_is_restored() {
    everywhere(|place| {
        let process = place.process();
        assert_eq!(process.next_generation().unwrap(), 1);
        let claim = process.claim(1).unwrap();
        assert_eq!(process.newest().unwrap(), None);
        let published = save(&process, &claim, 12).unwrap();
        assert_eq!(published.url, format!("{}/step-00000012/g1", process.url()));

        let reader = place.process();
        let restored = reader.newest().unwrap().unwrap();
        assert_eq!(restored.dir, "step-00000012/g1");
        assert_eq!(restored.manifest.head, head(12, 2));
        assert!(restored.skipped.is_empty() && restored.unreadable.is_empty());
        let model = reader.read_model(&restored).unwrap();
        for rank in [0, 1] {
            let tensor = &model[&format!("layer{rank}.weight")];
            assert_eq!(tensor.shape, [2, 3]);
            assert_eq!(tensor.to_f32().unwrap(), weight(12, rank));
        }
        assert_eq!(reader.read_flat(&restored, "m", 0..FLAT).unwrap(), flat(12));
        let contract = reader.read_file(&restored, "contract.json").unwrap();
        assert_eq!(contract, r#"{"step":12}"#);
        assert_eq!(reader.next_generation().unwrap(), 2);

        let json = serde_json::to_string(&restored).unwrap();
        assert_eq!(restored, serde_json::from_str(&json).unwrap());
    });
}

#[test]
fn the_layout_is_the_documented_one() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let published = save(&process, &claim, 12).unwrap();
        let dir = "step-00000012/g1";
        let files = [
            "MANIFEST.json",
            "contract.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "optim-00001-of-00002.safetensors",
            "optim-00002-of-00002.safetensors",
        ];
        let mut expected = vec!["LATEST".into()];
        expected.extend(["log/00000001.json".into(), "log/00000002.json".into()]);
        expected.extend(files.map(|file| format!("{dir}/{file}")));
        assert_eq!(place.paths(), expected);
        assert_eq!(place.get("LATEST"), b"step-00000012/g1\n");
        let sizes = files.map(|file| place.get(&format!("{dir}/{file}")).len() as u64);
        assert_eq!(published.bytes, sizes.iter().sum::<u64>());

        // The public reader finds every tensor through the public index.
        let index = place.get(&format!("{dir}/model.safetensors.index.json"));
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 2 * 6 * 4);
        for (tensor, file) in index["weight_map"].as_object().unwrap() {
            let bytes = place.get(&format!("{dir}/{}", file.as_str().unwrap()));
            let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(read.names(), [tensor]);
            assert_eq!(read.tensor(tensor).unwrap().shape(), [2, 3]);
        }
        let optim = place.get(&format!("{dir}/optim-00002-of-00002.safetensors"));
        let optim = safetensors::SafeTensors::deserialize(&optim).unwrap();
        assert_eq!(optim.names(), ["m@5"]);
    });
}

#[test]
fn any_world_size_restores_any_other() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let step = Mutex::new(0);
        let ranges = (
            0_u64..60,
            proptest::array::uniform2(0.0..=1.0_f64),
            0.0..=1.0_f64,
        );
        let mut runner = TestRunner::new(Cases {
            cases: 12,
            failure_persistence: None,
            ..Cases::default()
        });
        runner
            .run(&ranges, |(len, mut cuts, half)| {
                cuts.sort_by(f64::total_cmp);
                let cut = |share: f64| (share * len as f64) as u64;
                let values: Vec<f32> = (0..len).map(|i| i as f32 * 0.5).collect();
                let worlds = [
                    vec![0, cut(cuts[0]), cut(cuts[1]), len],
                    vec![0, cut(half), len],
                    vec![0, len],
                ];
                let mut before = None;
                for bounds in worlds {
                    let world_size = bounds.len() as u32 - 1;
                    *step.lock().unwrap() += 1;
                    let step = *step.lock().unwrap();
                    let mut files = Vec::new();
                    for (rank, bound) in bounds.windows(2).enumerate() {
                        let range = bound[0]..bound[1];
                        let part = match &before {
                            None => values[range.start as usize..range.end as usize].to_vec(),
                            Some(restored) if len > 0 => {
                                process.read_flat(restored, "v", range.clone()).unwrap()
                            }
                            Some(_) => Vec::new(),
                        };
                        let slice = FlatSlice {
                            name: "v".into(),
                            global_len: len,
                            offset: range.start,
                            values: Values::F32(&part),
                        };
                        let writer = process.writer(&claim, step, rank as u32, world_size);
                        files.push(writer.write_flat(&[slice]).unwrap());
                    }
                    let head = head(step, world_size);
                    process.publish(&claim, head, files).unwrap();
                    before = process.newest().unwrap();
                }
                let restored = before.unwrap();
                if len > 0 {
                    let read = process.read_flat(&restored, "v", 0..len).unwrap();
                    prop_assert_eq!(read, values);
                }
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn ranges_that_are_not_there_are_refused() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        save(&process, &claim, 1).unwrap();
        let restored = process.newest().unwrap().unwrap();
        assert_eq!(process.flat_len(&restored, "m").unwrap(), FLAT);
        assert_eq!(
            process.read_flat(&restored, "m", 4..6).unwrap(),
            flat(1)[4..6]
        );
        for (name, range) in [
            ("m", 0..FLAT + 1),
            ("m", u64::MAX - 1..u64::MAX),
            ("n", 0..1),
        ] {
            let error = process.read_flat(&restored, name, range).unwrap_err();
            assert!(matches!(error, Error::Absent { .. }), "{error}");
        }
        let error = process.read_file(&restored, "none.json").unwrap_err();
        assert_eq!(error.class(), ErrorClass::User);
    });
}

#[test]
fn damage_is_found_and_the_older_checkpoint_is_taken() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        save(&process, &claim, 10).unwrap();
        let mut step = 10;
        for file in [
            "MANIFEST.json",
            "contract.json",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "optim-00001-of-00002.safetensors",
        ] {
            for kind in [Damage::Flip, Damage::Cut, Damage::Delete] {
                step += 1;
                save(&process, &claim, step).unwrap();
                let path = format!("step-{step:08}/g1/{file}");
                damage(place, &path, kind);
                let restored = place.process().newest().unwrap().unwrap();
                assert_eq!(restored.manifest.head.step, 10, "{file} {kind:?}");
                let skipped = restored.skipped.first().unwrap();
                assert_eq!((skipped.step, skipped.generation), (step, 1));
                assert!(skipped.reason.contains(file), "{file} {kind:?}: {skipped}");
                let model = process.read_model(&restored).unwrap();
                let read = model["layer1.weight"].to_f32().unwrap();
                assert_eq!(read, weight(10, 1));
            }
        }
    });
}

#[test]
fn a_damaged_log_entry_hides_its_checkpoint_and_no_other() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        save(&process, &claim, 10).unwrap();
        save(&process, &claim, 11).unwrap();
        save(&process, &claim, 12).unwrap();
        for kind in [Damage::Flip, Damage::Cut, Damage::Delete] {
            let before = place.get("log/00000003.json");
            damage(place, "log/00000003.json", kind);
            let restored = place.process().newest().unwrap().unwrap();
            assert_eq!(restored.manifest.head.step, 12, "{kind:?}");
            assert_eq!(restored.unreadable.len(), 1, "{kind:?}");
            let reason = &restored.unreadable[0];
            assert!(reason.starts_with("log/00000003.json"), "{reason}");
            place.put("log/00000003.json", before);
        }
        damage(place, "log/00000004.json", Damage::Cut);
        let restored = place.process().newest().unwrap().unwrap();
        assert_eq!(restored.manifest.head.step, 11);
        assert_eq!(restored.unreadable.len(), 1);
        // The log can be written on.
        let process = place.process();
        let claim = process.claim(2).unwrap();
        save(&process, &claim, 12).unwrap();
        assert_eq!(newest_step(place), Some((12, 2)));
    });
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_does_not_start_again() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        for step in [1, 2] {
            save(&process, &claim, step).unwrap();
            damage(
                place,
                &format!("step-{step:08}/g1/contract.json"),
                Damage::Flip,
            );
        }
        let error = place.process().newest().unwrap_err();
        assert_eq!(error.class(), ErrorClass::Corrupt);
        let text = error.to_string();
        assert!(
            text.contains("step 1 of") && text.contains("step 2 of"),
            "{text}"
        );
        // Sizes alone do not show it, reading does.
        let process = place.process();
        let restored = process.newest_by(Verify::Sizes).unwrap().unwrap();
        assert_eq!(restored.manifest.head.step, 2);
        let error = process.read_file(&restored, "contract.json").unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    });
}

#[test]
fn an_old_generation_publishes_nothing() {
    everywhere(|place| {
        let (old, new) = (place.process(), place.process());
        let old_claim = old.claim(1).unwrap();
        save(&old, &old_claim, 10).unwrap();
        let new_claim = new.claim(2).unwrap();
        // The old one reaches the step first.
        let fenced = |error: Error| match error {
            Error::Fenced {
                generation: 1,
                by_generation: 2,
            } => {}
            other => panic!("{other}"),
        };
        fenced(save(&old, &old_claim, 20).unwrap_err());
        assert_eq!(newest_step(place), Some((10, 1)));
        save(&new, &new_claim, 20).unwrap();
        fenced(save(&old, &old_claim, 21).unwrap_err());
        fenced(old.retain(&old_claim, &Config::default()).unwrap_err());
        assert_eq!(newest_step(place), Some((20, 2)));
        let publications = place
            .paths()
            .iter()
            .filter(|p| p.starts_with("log/"))
            .count();
        assert_eq!(publications, 4, "two claims, two checkpoints");
    });
}

#[test]
fn a_claim_between_the_check_and_the_commit_fences_too() {
    everywhere(|place| {
        let newer = Mutex::new(None);
        let process = place.process();
        let other = place.process();
        let armed = Arc::new(Mutex::new(false));
        let claims: Arc<Mutex<Vec<u64>>> = Arc::default();
        let (arm, seen) = (Arc::clone(&armed), Arc::clone(&claims));
        let process = process.with_stage_hook(Arc::new(move |stage: &str| {
            if stage == "before log entry" && std::mem::take(&mut *arm.lock().unwrap()) {
                // The hook runs inside the runtime's context: block on a thread of its own.
                let claimed = std::thread::scope(|scope| {
                    scope.spawn(|| other.claim(2).unwrap()).join().unwrap()
                });
                seen.lock().unwrap().push(claimed.generation);
                *newer.lock().unwrap() = Some(claimed);
            }
            Ok(())
        }));
        let claim = process.claim(1).unwrap();
        save(&process, &claim, 10).unwrap();
        *armed.lock().unwrap() = true;
        let error = save(&process, &claim, 20).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Fenced {
                    by_generation: 2,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(*claims.lock().unwrap(), [2]);
        assert_eq!(newest_step(place), Some((10, 1)));
    });
}

#[test]
fn generations_are_used_once() {
    everywhere(|place| {
        let process = place.process();
        process.claim(3).unwrap();
        for taken in [1, 2, 3] {
            let error = place.process().claim(taken).unwrap_err();
            let Error::GenerationTaken { next, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(next, 4);
        }
        assert_eq!(process.next_generation().unwrap(), 4);
        // Of many that start at once with the same number one wins.
        let handles: Vec<_> = (0..6).map(|_| place.process()).collect();
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = handles
                .iter()
                .map(|process| scope.spawn(|| process.claim(4)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        let lost = outcomes.into_iter().filter_map(Result::err);
        assert!(
            lost.into_iter()
                .all(|error| matches!(error, Error::GenerationTaken { next: 5, .. }))
        );
    });
}

#[test]
fn an_incomplete_checkpoint_is_not_published() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let first = write_rank(&process, &claim, 5, 0, 2);
        let second = write_rank(&process, &claim, 5, 1, 2);
        let refuse = |files: Vec<_>, fault: &str| {
            let error = process.publish(&claim, head(5, 2), files).unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{error}");
            assert!(error.to_string().contains(fault), "{error}");
        };
        refuse(
            first.clone(),
            "`model-00002-of-00002.safetensors` is missing",
        );
        refuse(first.clone(), "array `m` is known up to 5 of 10");
        let mut twice = second.clone();
        twice[0].tensors[0].name = "layer0.weight".into();
        refuse(
            [first.clone(), twice].concat(),
            "tensor `layer0.weight` is there twice",
        );
        let mut both = [first, second].concat();
        let path = "step-00000005/g1/contract.json";
        let contract = place.get(path);
        damage(place, path, Damage::Cut);
        refuse(both.clone(), "`contract.json` has");
        damage(place, path, Damage::Delete);
        refuse(both.clone(), "`contract.json` is missing");
        place.put(path, contract);
        assert_eq!(newest_step(place), None);
        process.publish(&claim, head(5, 2), both.clone()).unwrap();
        // The same again is the same; anything else is too late.
        process.publish(&claim, head(5, 2), both.clone()).unwrap();
        both.remove(2);
        let error = process.publish(&claim, head(5, 2), both).unwrap_err();
        assert!(matches!(error, Error::AlreadyPublished { .. }), "{error}");
        let error = process.writer(&claim, 5, 0, 1).write_file("x", "".into());
        assert!(matches!(error, Err(Error::AlreadyPublished { .. })));
        assert_eq!(newest_step(place), Some((5, 1)));
    });
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let writer = process.writer(&claim, 5, 0, 1);
        for name in ["../x", "a/b", "", ".hidden", "MANIFEST.json"] {
            assert!(writer.write_file(name, "x".into()).is_err(), "{name}");
        }
        assert_eq!(place.paths(), ["log/00000001.json"]);
    });
}

#[test]
fn retention_keeps_what_it_should() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let config = Config {
            keep_last: 2,
            keep_every: Some(20),
            ..Config::default()
        };
        for step in [10, 20, 30, 40, 50] {
            save(&process, &claim, step).unwrap();
        }
        let gone = process.retain(&claim, &config).unwrap();
        let id = |step| CheckpointId {
            step,
            generation: 1,
        };
        assert_eq!(gone, [id(10), id(30)]);
        let left = |step: u64| {
            let dir = id(step).to_string();
            place.paths().iter().any(|path| path.starts_with(&dir))
        };
        let steps: Vec<u64> = [10, 20, 30, 40, 50]
            .into_iter()
            .filter(|s| left(*s))
            .collect();
        assert_eq!(steps, [20, 40, 50]);
        assert!(process.retain(&claim, &config).unwrap().is_empty());
        assert_eq!(newest_step(place), Some((50, 1)));
    });
}

#[test]
fn the_last_checkpoint_that_verifies_is_never_deleted() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let config = Config {
            keep_last: 1,
            ..Config::default()
        };
        for step in [10, 20, 30] {
            save(&process, &claim, step).unwrap();
        }
        let optim = "optim-00001-of-00002.safetensors";
        damage(place, &format!("step-00000030/g1/{optim}"), Damage::Flip);
        let gone = process.retain(&claim, &config).unwrap();
        assert_eq!(gone.iter().map(|id| id.step).collect::<Vec<_>>(), [10]);
        assert_eq!(newest_step(place), Some((20, 1)));
        damage(place, &format!("step-00000020/g1/{optim}"), Damage::Flip);
        assert!(place.process().retain(&claim, &config).unwrap().is_empty());
    });
}

#[test]
fn the_best_checkpoints_are_kept_also_by_a_process_that_did_not_write_them() {
    everywhere(|place| {
        let process = place.process();
        let claim = process.claim(1).unwrap();
        let errors = [
            (10, Some(0.3)),
            (20, Some(0.1)),
            (30, None),
            (40, Some(0.2)),
        ];
        for (step, eval_error) in errors {
            let files = [0, 1].map(|rank| write_rank(&process, &claim, step, rank, 2));
            let head = pollen_checkpoints::ManifestHead {
                eval_error,
                ..head(step, 2)
            };
            process.publish(&claim, head, files.concat()).unwrap();
        }
        let config = Config {
            keep_last: 1,
            keep_best: 1,
            ..Config::default()
        };
        save(&process, &claim, 50).unwrap();
        let other = place.process();
        let claim = other.claim(2).unwrap();
        let gone = other.retain(&claim, &config).unwrap();
        let steps: Vec<u64> = gone.iter().map(|id| id.step).collect();
        assert_eq!(steps, [10, 30, 40], "20 has the lowest error");
    });
}

#[test]
fn leftovers_of_a_dead_attempt_trip_nobody_and_are_swept() {
    everywhere(|place| {
        let dead = place.process();
        let claim = dead.claim(1).unwrap();
        save(&dead, &claim, 10).unwrap();
        write_rank(&dead, &claim, 20, 0, 2);
        place.put("step-00000020/g1/MANIFEST.json", b"{}".to_vec());
        let process = place.process();
        let claim = process.claim(2).unwrap();
        assert_eq!(newest_step(place), Some((10, 1)));
        // Written twice by the same generation: the second counts.
        write_rank(&process, &claim, 20, 0, 2);
        place.put("step-00000020/g2/MANIFEST.json", b"{}".to_vec());
        save(&process, &claim, 20).unwrap();
        assert_eq!(newest_step(place), Some((20, 2)));
        process.retain(&claim, &Config::default()).unwrap();
        let paths = place.paths();
        assert!(
            !paths
                .iter()
                .any(|path| path.starts_with("step-00000020/g1"))
        );
        assert!(
            paths
                .iter()
                .any(|path| path.starts_with("step-00000010/g1"))
        );
        assert_eq!(newest_step(place), Some((20, 2)));
    });
}

/// A process that dies at any stage of a save leaves a run that the next one can take over.
#[test]
fn death_at_every_stage_is_survived() {
    let stages: Arc<Mutex<Vec<String>>> = Arc::default();
    let place = Place::memory();
    let seen = Arc::clone(&stages);
    let process = place.process().with_stage_hook(Arc::new(move |stage| {
        seen.lock().unwrap().push(stage.into());
        Ok(())
    }));
    let claim = process.claim(1).unwrap();
    save(&process, &claim, 20).unwrap();
    let stages = std::mem::take(&mut *stages.lock().unwrap());
    let named = [
        "before claim",
        "before MANIFEST",
        "after MANIFEST",
        "after log entry",
    ];
    assert!(
        named
            .iter()
            .all(|name| stages.iter().any(|stage| stage == name))
    );
    let committed = stages
        .iter()
        .position(|stage| stage == "after log entry")
        .unwrap();

    everywhere(|place| {
        let process = place.process();
        let mut generation = process.next_generation().unwrap();
        let claim = process.claim(generation).unwrap();
        save(&process, &claim, 10).unwrap();
        for (at, deadly) in stages.iter().enumerate() {
            let step = 20 + at as u64;
            generation += 1;
            let before = newest_step(place).unwrap();
            let name = deadly.clone();
            let dying = place.process().with_stage_hook(Arc::new(move |stage| {
                assert!(stage != name, "dies here");
                Ok(())
            }));
            let death = catch_unwind(AssertUnwindSafe(|| {
                let claim = dying.claim(generation).unwrap();
                save(&dying, &claim, step).unwrap();
            }));
            assert!(death.is_err(), "{deadly}");
            let expected = if at < committed {
                before
            } else {
                (step, generation)
            };
            assert_eq!(newest_step(place), Some(expected), "{deadly}");

            let next = place.process();
            generation = next.next_generation().unwrap();
            let claim = next.claim(generation).unwrap();
            save(&next, &claim, step).unwrap();
            assert_eq!(newest_step(place), Some((step, generation)), "{deadly}");
        }
    });
}
