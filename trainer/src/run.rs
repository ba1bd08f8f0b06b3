//! One worker, from its arguments to its exit code.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use pollen_checkpoints::{Checkpoints, Restored};
use pollen_collectives::{Communicator, Deadline, Store, host_name, rendezvous};
use pollen_core::{ActionSpace, Clock, Seed, SystemClock};
use pollen_dataloader::{Data, Loader, LoaderArgs, Mixture, ModelShape, ORDER_VERSION};
use pollen_model::Flower;
use pollen_observe::{Budget, Event, EventLog, StartEvent};
use pollen_storage::{Observer, Storage};

use crate::batch::BatchBuilder;
use crate::config::RunConfig;
use crate::data_parallel::Reduction;
use crate::device::{DeviceKind, Seat};
use crate::device_memory::Place;
use crate::ema::Ema;
use crate::error::Error;
use crate::layout::{Layout, Shard};
use crate::optim::AdamW;
use crate::phases::{Phase, PhaseTimer};
use crate::pulse::Pulse;
use crate::randomness::Randomness;
use crate::recovery::{Connection, Identity, Recovery};
use crate::schedule::EmaConfig;
use crate::signals::StopFlags;
use crate::step::Trainer;
use crate::store_events::StoreEvents;
use crate::training_loop::{Outcome, Session, evaluate, skipped, train};
use crate::watchdog::{Post, Verdict, Watchdog};

/// What a worker is told.
#[derive(Clone, Debug)]
pub struct WorkerArgs {
    /// The recipe.
    pub config: RunConfig,
    /// Hash of what makes this run this run.
    pub config_hash: String,
    /// Local folder of the run, for events.
    pub run_dir: PathBuf,
    /// Object-store folder of the run, for checkpoints.
    pub run_url: String,
    /// The run's id.
    pub run_id: String,
    /// This worker's rank.
    pub rank: u32,
    /// This worker's number on its machine.
    pub local_rank: u32,
    /// Number of workers.
    pub world_size: u32,
    /// Which start of the run this is.
    pub generation: u64,
    /// Address of the rendezvous store.
    pub store: String,
    /// Continue although a dataset changed since the checkpoint.
    pub accept_new_data: bool,
}

/// Runs a worker to its end and records it.
pub fn run_worker(args: WorkerArgs, stop: StopFlags) -> Result<Outcome, Error> {
    crate::faults::identify(args.generation, args.rank);
    let (path, run, rank) = (
        args.run_dir.join("events.jsonl"),
        args.run_id.clone(),
        args.rank,
    );
    let generation = args.generation;
    let log = || EventLog::open(&path, &run, generation, Some(rank));
    let events = log()?;
    let observer: Arc<dyn Observer> = Arc::new(StoreEvents::new(log()?));
    let verdict = Verdict::default();
    let result = Worker::new(args, stop, observer, (log()?, verdict.clone()))
        .and_then(|worker| worker.run(log()?))
        .map_err(|error| verdict.explain(error));
    let (exit, reason) = match &result {
        Ok(outcome) => (outcome.exit, outcome.reason.clone()),
        Err(error) => (error.exit_code(), error.to_string()),
    };
    events.append(Event::End {
        exit_code: i32::from(exit.code()),
        reason,
    })?;
    result
}

/// A worker with its connections, before it has a model.
struct Worker {
    args: WorkerArgs,
    stop: StopFlags,
    runtime: Arc<tokio::runtime::Runtime>,
    observer: Arc<dyn Observer>,
    store: Store,
    communicator: Arc<dyn Communicator>,
    seat: Seat,
    clock: Arc<dyn Clock>,
    deadline: Duration,
    pulse: Arc<Pulse>,
    // Last: it watches over the good-bye of the communicator as well.
    _watchdog: Option<Watchdog>,
}

impl Worker {
    fn new(
        args: WorkerArgs,
        stop: StopFlags,
        observer: Arc<dyn Observer>,
        (events, verdict): (EventLog, Verdict),
    ) -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("pollen-io")
            .enable_all()
            .build()
            .map_err(|source| Error::File {
                path: "the I/O threads".into(),
                source,
            })?;
        let config = &args.config.communicator;
        let deadline = config.timeout;
        let store = Store::connect(&args.store, Deadline::after(config.join_timeout))?
            .prefixed(&format!("g{}/", args.generation));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let pulse = Arc::new(Pulse::new(
            Arc::clone(&clock),
            args.config.watchdog.clone(),
            args.config.storage.retry_for,
        ));
        let watchdog = Watchdog::start(Post {
            config: args.config.watchdog.clone(),
            store: store.clone(),
            rank: args.rank,
            world_size: args.world_size,
            host: host_name(),
            pulse: Arc::clone(&pulse),
            clock: Arc::clone(&clock),
            events,
            run_dir: args.run_dir.clone(),
            verdict,
        })?;
        crate::faults::reach(0, Phase::Rendezvous.name());
        let seat = Seat::of(args.config.train.device, args.local_rank)?;
        let communicator = rendezvous::connect_on(
            config,
            &store,
            args.rank,
            args.world_size,
            args.generation,
            seat.gpu(),
        )?;
        if let Some(watchdog) = &watchdog {
            watchdog.guard(&communicator);
        }
        Ok(Self {
            args,
            stop,
            runtime: Arc::new(runtime),
            observer,
            store,
            communicator,
            seat,
            clock,
            deadline,
            pulse,
            _watchdog: watchdog,
        })
    }

    fn run(self, events: EventLog) -> Result<Outcome, Error> {
        let config = &self.args.config;
        self.enter(Phase::Open);
        let data = self.data()?;
        let mixture = Arc::new(data.mixture(Seed::new(config.seed))?);
        let device = self.seat.open()?.autodiff();
        let seed = Seed::new(config.seed).child("weights");
        let model = config.model.init(&config.action_spaces, seed, &device)?;
        let model = model.with_precision(config.train.precision);
        let layout = Layout::of_run(config)?;
        let identity = self.identity(&data, &layout);
        let url = format!("{}/checkpoints", self.args.run_url.trim_end_matches('/'));
        let storage = Storage::open(&url, &config.storage, Arc::clone(&self.observer))?;
        let checkpoints = Checkpoints::new(storage, self.runtime.handle().clone())
            .with_stage_hook(Arc::new(|stage: &str| crate::faults::reach_stage(stage)));
        let events = Arc::new(events);
        let connection = Connection {
            checkpoints,
            runtime: Arc::clone(&self.runtime),
            store: self.store.clone(),
            rank: self.args.rank,
            world_size: self.args.world_size,
            generation: self.args.generation,
            deadline: self.deadline,
            config: config.checkpoint.clone(),
            events: Arc::clone(&events),
            clock: Arc::clone(&self.clock),
        };
        self.enter(Phase::Restore);
        let (recovery, restored) = Recovery::start(connection, identity)?;
        if let Some(restored) = &restored {
            recovery.check(restored, self.args.accept_new_data)?;
        }
        let model = if restored.is_some() {
            model
        } else {
            let observer = Arc::clone(&self.observer);
            crate::initial::load(model, config, &device, self.runtime.handle(), observer)?
        };
        let state = State::load(
            model,
            config.train.ema.as_ref(),
            (&layout, self.shard()),
            &device,
            &recovery,
            restored.as_ref(),
        )?;
        let spent = restored
            .as_ref()
            .map_or(0.0, |r| r.manifest.head.gpu_hours_spent);
        let limit = Some(config.budget.max_gpu_hours);
        let budget = Budget::new(spent, self.args.world_size, self.clock.wall(), limit);
        let mut session = Session {
            events,
            run_dir: self.args.run_dir.clone(),
            recovery,
            budget,
            clock: Arc::clone(&self.clock),
        };
        self.enter(Phase::Open);
        let mut trainer = self.trainer(data, mixture, layout, device, state)?;
        self.announce(
            &session,
            restored.as_ref(),
            (&url, self.seat.kind()),
            trainer.step,
        )?;
        let outcome = train(&mut trainer, &mut session)?;
        if outcome.exit == pollen_core::ExitCode::Done && trainer.eval_error().is_none() {
            evaluate(&mut trainer, &session)?;
        }
        self.pulse.enter(trainer.step, Phase::AllReduce);
        self.communicator.barrier()?;
        Ok(outcome)
    }

    /// Enters a phase before the first step; a fault asked for there strikes.
    fn enter(&self, phase: Phase) {
        self.pulse.enter(0, phase);
        crate::faults::reach(0, phase.name());
    }

    fn data(&self) -> Result<Arc<Data>, Error> {
        let config = &self.args.config;
        let widest =
            |of: fn(&ActionSpace) -> usize| config.action_spaces.iter().map(of).max().unwrap_or(0);
        let shape = ModelShape {
            action_horizon: config.model.flow.action_horizon,
            action_width: widest(ActionSpace::dim),
            proprio_width: widest(|space| space.proprio_dim),
        };
        let open = |url: &str| Storage::open(url, &config.storage, Arc::clone(&self.observer));
        let data = Data::open(&config.data, &config.action_spaces, shape, &open);
        let data = self.runtime.block_on(data)?;
        // The table's last row belongs to the prompt token, which no tokenizer knows.
        let (words, rows) = (data.vocabulary_size(), config.model.language.vocab_size);
        if words >= rows {
            return Err(Error::Recipe(vec![format!(
                "{} has {words} tokens, so model.language.vocab_size = {rows} must be at least {}",
                config.data.tokenizer.display(),
                words + 1
            )]));
        }
        Ok(Arc::new(data))
    }

    /// Returns what this rank keeps of the optimizer's state.
    fn shard(&self) -> Shard {
        if self.args.config.train.shard_optimizer {
            Shard {
                part: self.args.rank as usize,
                parts: self.args.world_size as usize,
            }
        } else {
            Shard::WHOLE
        }
    }

    fn identity(&self, data: &Data, layout: &Layout) -> Identity {
        Identity {
            config_hash: self.args.config_hash.clone(),
            layout_hash: layout.hash(),
            order_version: ORDER_VERSION,
            dataset_hashes: data.hashes().into_iter().collect(),
            contract: data.contract().to_json().into_bytes(),
        }
    }

    fn trainer(
        &self,
        data: Arc<Data>,
        mixture: Arc<Mixture>,
        layout: Layout,
        device: Device,
        state: State,
    ) -> Result<Trainer, Error> {
        let config = self.args.config.clone();
        let (rank, world_size) = (self.args.rank, self.args.world_size);
        let audits_left = config.train.audit_steps;
        let accumulation = config
            .accumulation(world_size)
            .map_err(|fault| Error::Recipe(vec![fault]))?;
        let loader = Loader::start(
            LoaderArgs {
                data: Arc::clone(&data),
                mixture: Arc::clone(&mixture),
                seed: Seed::new(config.seed),
                rank: rank as usize,
                world_size: world_size as usize,
                global_batch: config.train.global_batch as usize,
                micro_batch: config.train.micro_batch as usize,
                first_sample: state.step * u64::from(config.train.global_batch),
            },
            self.runtime.handle(),
        )?;
        Ok(Trainer {
            batches: BatchBuilder {
                device: device.clone(),
                randomness: Randomness::new(config.seed),
                global_batch: u64::from(config.train.global_batch),
                spaces: config.action_spaces.clone(),
                trim_text: config.model.ignores_padding(),
            },
            model: state.model,
            optimizer: state.optimizer,
            ema: state.ema,
            step: state.step,
            non_finite: state.non_finite,
            bad_samples: state.bad_samples,
            config,
            layout,
            mean_chunks: Vec::new(),
            runtime: self.runtime.handle().clone(),
            data,
            mixture,
            loader,
            communicator: Arc::clone(&self.communicator),
            reduction: Reduction {
                communicator: Arc::clone(&self.communicator),
                shard: self.shard(),
                dtype: self.args.config.train.reduce_dtype,
                overlap: self.args.config.train.overlap,
                place: Place::of(&device)?,
            },
            device,
            timer: PhaseTimer::new(Arc::clone(&self.clock), Arc::clone(&self.pulse)),
            stop: self.stop.clone(),
            accumulation,
            measured: None,
            over_budget: false,
            save_failed: false,
            prove_exchange: true,
            audits_left,
        })
    }

    fn announce(
        &self,
        session: &Session,
        restored: Option<&Restored>,
        (url, device): (&str, DeviceKind),
        step: u64,
    ) -> Result<(), Error> {
        if self.args.rank != 0 {
            return Ok(());
        }
        if let Some(restored) = restored {
            session.events.append(Event::Restore {
                step,
                url: format!("{url}/{}", restored.dir),
                skipped: skipped(url, &restored.skipped),
            })?;
        }
        let config = &self.args.config;
        session.events.append(Event::Start(StartEvent {
            world_size: self.args.world_size,
            step,
            steps: config.train.steps,
            global_batch: u64::from(config.train.global_batch),
            communicator: self.communicator.name().to_owned(),
            device: device.name().into(),
            gpu_hours_before: restored.map_or(0.0, |r| r.manifest.head.gpu_hours_spent),
            max_gpu_hours: Some(config.budget.max_gpu_hours),
        }))?;
        Ok(())
    }
}

/// What a checkpoint brings back.
struct State {
    model: Flower,
    optimizer: AdamW,
    ema: Option<Ema>,
    step: u64,
    non_finite: u64,
    bad_samples: u64,
}

impl State {
    fn load(
        model: Flower,
        ema: Option<&EmaConfig>,
        (layout, shard): (&Layout, Shard),
        device: &Device,
        recovery: &Recovery,
        restored: Option<&Restored>,
    ) -> Result<Self, Error> {
        let plain = device.clone().inner();
        let Some(restored) = restored else {
            return Ok(Self {
                ema: ema.map(|ema| Ema::new(ema.clone(), &model, layout)),
                model,
                optimizer: AdamW::new(layout, shard, &plain),
                step: 0,
                non_finite: 0,
                bad_samples: 0,
            });
        };
        let head = &restored.manifest.head;
        let mut tensors = recovery.checkpoints().read_model(restored)?;
        let mut missing = Vec::new();
        let wanted: std::collections::HashMap<String, usize> = model
            .parameters()
            .into_iter()
            .map(|info| (info.name, info.shape.iter().product()))
            .collect();
        let model = model.with_flat_parameters(&mut |name| {
            let values = tensors.remove(name).and_then(|tensor| tensor.to_f32());
            match values {
                Some(values) if wanted.get(name) == Some(&values.len()) => {
                    Some(crate::data_parallel::to_device(values, &plain))
                }
                _ => {
                    missing.push(name.to_owned());
                    None
                }
            }
        });
        if let Some(name) = missing.first() {
            let reason = format!(
                "{} tensors are missing or of another size, the first is `{name}`; restore the \
                 recipe that wrote it",
                missing.len()
            );
            return Err(Error::Mismatch {
                step: head.step,
                reason,
            });
        }
        let optimizer = AdamW::restore(layout, shard, &plain, head.updates, |name, range| {
            recovery.checkpoints().read_flat(restored, name, range)
        })?;
        let ema = ema
            .map(|ema| {
                let averages = recovery.checkpoints().read_ema(restored)?;
                Ema::restore(ema.clone(), layout, averages, &plain).map_err(|name| {
                    Error::Mismatch {
                        step: head.step,
                        reason: format!(
                            "it has no averaged weights for `{name}`; remove train.ema, or restore the recipe that wrote it"
                        ),
                    }
                })
            })
            .transpose()?;
        let counted = |key: &str| head.extra[key].as_u64().unwrap_or(0);
        Ok(Self {
            model,
            optimizer,
            ema,
            step: head.step,
            non_finite: counted("non_finite"),
            bad_samples: counted("bad_samples"),
        })
    }
}
