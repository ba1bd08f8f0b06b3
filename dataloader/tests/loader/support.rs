//! LeRobot datasets written in a temporary folder, and loaders over them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, StringBuilder};
use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StringArray,
    StructArray,
};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytesize::ByteSize;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use pollen_core::{ActionSpace, ActionSpaceFile, Seed};
use pollen_dataloader::{
    Augment, ChunkLength, Data, DataConfig, DatasetConfig, Filters, Frame, Gripper, HostBatch,
    Instruction, Loader, LoaderArgs, ModelShape, Motion, Source, WeightMeaning,
};
use pollen_processing::{Normalization, ResizeKind, Transform};
use pollen_storage::{Silent, Storage, StorageConfig};
use tokio::runtime::Runtime;

pub(crate) const PRIMARY: &str = "observation.images.primary";
pub(crate) const WRIST: &str = "observation.images.wrist";

pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns JPEG frames (96 x 96) of the committed demo dataset `lift`.
pub(crate) fn demo_jpegs() -> Vec<Vec<u8>> {
    use arrow_array::cast::AsArray;
    let path = workspace().join("demo/data/lift/data/chunk-000/file-000.parquet");
    let file = std::fs::File::open(path).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .with_limit(64)
        .build()
        .unwrap();
    let mut jpegs = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        let images = batch.column_by_name(PRIMARY).unwrap().as_struct();
        let bytes = images.column_by_name("bytes").unwrap().as_binary::<i32>();
        jpegs.extend(bytes.iter().flatten().map(<[u8]>::to_vec));
    }
    jpegs
}

/// A dataset to write.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) cameras: Vec<String>,
    pub(crate) state_dim: usize,
    /// Length of each episode.
    pub(crate) episodes: Vec<u64>,
    pub(crate) rows_per_group: usize,
    /// Episodes in a data file.
    pub(crate) episodes_per_file: usize,
    pub(crate) action_dim: usize,
    /// As LeRobot writes: dictionary pages and snappy, in place of plain uncompressed bytes.
    pub(crate) snappy: bool,
    pub(crate) task: &'static str,
    pub(crate) jpegs: Arc<Vec<Vec<u8>>>,
    /// Bytes behind each wrist image, which decoders ignore.
    pub(crate) wrist_padding: usize,
    /// Global row whose primary image is replaced.
    pub(crate) bad_image: Option<(u64, Vec<u8>)>,
    /// Global row whose first action value is NaN.
    pub(crate) nan_action: Option<u64>,
}

impl Spec {
    pub(crate) fn new(name: &'static str, jpegs: &Arc<Vec<Vec<u8>>>) -> Self {
        Self {
            name,
            cameras: vec![PRIMARY.into(), WRIST.into()],
            state_dim: 3,
            episodes: vec![23, 31, 17, 40, 29, 12, 35],
            rows_per_group: 10,
            episodes_per_file: 3,
            action_dim: 7,
            snappy: false,
            task: "pick up the red cube",
            jpegs: Arc::clone(jpegs),
            wrist_padding: 0,
            bad_image: None,
            nan_action: None,
        }
    }

    pub(crate) fn num_frames(&self) -> u64 {
        self.episodes.iter().sum()
    }

    /// The action of a global row: distinct in every dimension.
    pub(crate) fn action(&self, row: u64) -> Vec<f32> {
        let value = |dim: usize| ((row * 37 + dim as u64 * 11) % 100) as f32 / 50.0 - 1.0;
        (0..self.action_dim).map(value).collect()
    }

    pub(crate) fn write(&self, root: &Path) {
        let dir = root.join(self.name);
        for folder in ["meta/episodes/chunk-000", "data/chunk-000"] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let image = r#"{"dtype":"image","shape":[96,96,3],"names":["height","width","channels"]}"#;
        let cameras = self
            .cameras
            .iter()
            .map(|name| format!(r#""{name}":{image},"#));
        let info = format!(
            r#"{{"codebase_version":"v3.0","fps":10,"total_episodes":{},"total_frames":{},
            "robot_type":"test","features":{{{}
            "observation.state":{{"dtype":"float32","shape":[{}],"names":null}},
            "action":{{"dtype":"float32","shape":[{}],"names":null}}}}}}"#,
            self.episodes.len(),
            self.num_frames(),
            cameras.collect::<String>(),
            self.state_dim,
            self.action_dim
        );
        std::fs::write(dir.join("meta/info.json"), info).unwrap();
        let tasks = RecordBatch::try_from_iter([
            (
                "task_index",
                Arc::new(Int64Array::from(vec![0])) as ArrayRef,
            ),
            ("task", Arc::new(StringArray::from(vec![self.task]))),
        ]);
        write_parquet(
            &dir.join("meta/tasks.parquet"),
            &tasks.unwrap(),
            usize::MAX,
            true,
        );
        let mut first = 0;
        let starts: Vec<i64> = self
            .episodes
            .iter()
            .map(|length| {
                first += *length as i64;
                first - *length as i64
            })
            .collect();
        let column = |values: Vec<i64>| Arc::new(Int64Array::from(values)) as ArrayRef;
        let lengths = self.episodes.iter().map(|&length| length as i64).collect();
        let episodes = RecordBatch::try_from_iter([
            ("episode_index", column((0..starts.len() as i64).collect())),
            ("length", column(lengths)),
            ("dataset_from_index", column(starts.clone())),
        ]);
        let path = dir.join("meta/episodes/chunk-000/file-000.parquet");
        write_parquet(&path, &episodes.unwrap(), usize::MAX, true);
        let numbers: Vec<usize> = (0..self.episodes.len()).collect();
        for (f, files) in numbers.chunks(self.episodes_per_file).enumerate() {
            let frames = files.iter().flat_map(|&e| {
                let start = starts[e] as u64;
                (0..self.episodes[e]).map(move |frame| (e as u64, frame, start + frame))
            });
            let batch = self.frames(&frames.collect::<Vec<_>>());
            let path = dir.join(format!("data/chunk-000/file-{f:03}.parquet"));
            write_parquet(&path, &batch, self.rows_per_group, self.snappy);
        }
    }

    fn frames(&self, frames: &[(u64, u64, u64)]) -> RecordBatch {
        let image = |offset: u64, bad: Option<&(u64, Vec<u8>)>, padding: usize| {
            let (mut bytes, mut path) = (BinaryBuilder::new(), StringBuilder::new());
            for (_, frame, row) in frames {
                let jpeg = &self.jpegs[((row + offset) % self.jpegs.len() as u64) as usize];
                let bad = bad.filter(|(at, _)| at == row).map(|(_, bytes)| bytes);
                let mut image = bad.unwrap_or(jpeg).clone();
                image.resize(image.len() + padding, 0);
                bytes.append_value(image);
                path.append_value(format!("frame-{frame:06}.jpg"));
            }
            let fields = Fields::from(vec![
                Field::new("bytes", DataType::Binary, true),
                Field::new("path", DataType::Utf8, true),
            ]);
            let columns: Vec<ArrayRef> = vec![Arc::new(bytes.finish()), Arc::new(path.finish())];
            Arc::new(StructArray::new(fields, columns, None)) as ArrayRef
        };
        let list = |width: usize, values: Vec<f32>| {
            let field = Arc::new(Field::new("element", DataType::Float32, true));
            let values = Arc::new(Float32Array::from(values));
            Arc::new(FixedSizeListArray::new(field, width as i32, values, None)) as ArrayRef
        };
        let numbers = |pick: fn(&(u64, u64, u64)) -> u64| {
            let values = frames.iter().map(|frame| pick(frame) as i64);
            Arc::new(Int64Array::from_iter_values(values)) as ArrayRef
        };
        let mut actions = Vec::new();
        for (_, _, row) in frames {
            let mut action = self.action(*row);
            if self.nan_action == Some(*row) {
                action[0] = f32::NAN;
            }
            actions.extend(action);
        }
        let states = frames.iter().flat_map(|&(_, _, row)| {
            let three = [row as f32, (row % 7) as f32, 0.5 - (row % 2) as f32];
            (0..self.state_dim).map(move |dim| three[dim % 3] + (dim / 3) as f32)
        });
        let cameras = self.cameras.iter().enumerate().map(|(camera, name)| {
            let bad = self.bad_image.as_ref().filter(|_| camera == 0);
            let padding = if camera == 1 { self.wrist_padding } else { 0 };
            (&**name, image(5 * camera as u64, bad, padding))
        });
        let mut columns: Vec<(&str, ArrayRef)> = cameras.collect();
        columns.extend([
            ("observation.state", list(self.state_dim, states.collect())),
            ("action", list(self.action_dim, actions)),
            ("frame_index", numbers(|frame| frame.1)),
            ("episode_index", numbers(|frame| frame.0)),
            ("index", numbers(|frame| frame.2)),
            ("task_index", numbers(|_| 0)),
        ]);
        let fields: Vec<Field> = columns
            .iter()
            .map(|(name, column)| Field::new(*name, column.data_type().clone(), true))
            .collect();
        let columns = columns.into_iter().map(|(_, column)| column).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    }

    pub(crate) fn config(&self) -> DatasetConfig {
        DatasetConfig {
            url: String::new(),
            weight: 1.0,
            embodiment: if self.action_dim == 7 { "one" } else { "two" }.into(),
            cameras: [("primary", PRIMARY), ("wrist", WRIST)]
                .map(|(role, feature)| (role.to_owned(), feature.to_owned()))
                .into(),
            action: "action".into(),
            state: "observation.state".into(),
            transform: Transform::default(),
            motion: Motion::Delta,
            filters: Filters::default(),
            chunk_length: 0,
            instruction: Instruction::Task,
            robot: "Panda".into(),
            prompt_space: String::new(),
            frame: Frame::Unstated,
            gripper: Gripper::OneIsOpen,
            motion_unit: String::new(),
            normalization: Normalization::QuantilesClipped,
            source: Source::default(),
            refused: String::new(),
            hz: 0.0,
            holdout_episodes: [2].into(),
        }
    }
}

fn write_parquet(path: &Path, batch: &RecordBatch, rows_per_group: usize, snappy: bool) {
    let mut properties = WriterProperties::builder().set_max_row_group_row_count(None);
    if snappy {
        properties = properties.set_compression(Compression::SNAPPY);
    } else {
        for feature in [PRIMARY, WRIST] {
            let column = ColumnPath::new(vec![feature.to_owned(), "bytes".to_owned()]);
            properties = properties.set_column_dictionary_enabled(column, false);
        }
    }
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties.build())).unwrap();
    let mut row = 0;
    while row < batch.num_rows() {
        let rows = rows_per_group.min(batch.num_rows() - row);
        writer.write(&batch.slice(row, rows)).unwrap();
        writer.flush().unwrap();
        row += rows;
    }
    writer.close().unwrap();
}

/// A section over datasets below `root`, with small windows.
pub(crate) fn config(root: &Path, specs: &[Spec]) -> DataConfig {
    DataConfig {
        root: format!("file://{}", root.display()),
        datasets: specs
            .iter()
            .map(|spec| (spec.name.to_owned(), spec.config()))
            .collect(),
        cameras: vec!["primary".into(), "wrist".into()],
        weight_meaning: WeightMeaning::TimesFrames,
        image_size: 32,
        resize: ResizeKind::BilinearShortSide,
        augment: Augment::RandomShift {
            pads: [("primary".to_owned(), 4)].into(),
        },
        window_bytes: ByteSize::kib(128),
        cache_bytes: ByteSize::kib(200),
        disk_cache: None,
        prefetch_batches: 3,
        decode_threads: 2,
        mask_padding: false,
        frequency_hz: 0.0,
        chunk_length: ChunkLength::Model,
        max_bad_samples: 0,
        tokenizer: workspace().join("demo/tokenizer.json"),
        florence_tokens: false,
        text_length: 50,
        index_dir: root.join("index"),
    }
}

pub(crate) const SHAPE: ModelShape = ModelShape {
    action_horizon: 6,
    action_width: 14,
    proprio_width: 3,
};

/// Two action spaces: `one` (7 dimensions, 3 of proprioception) and `two` (14, none).
pub(crate) fn spaces() -> Vec<ActionSpace> {
    ["two", "one"]
        .map(|name| {
            let (dims, proprio) = if name == "one" { (7, 3) } else { (14, 0) };
            let dims: Vec<String> = (0..dims)
                .map(|i| {
                    let normalize = if i == 6 { "keep" } else { "quantiles" };
                    format!("{{ name = \"d{i}\", unit = \"m\", normalize = \"{normalize}\" }}")
                })
                .collect();
            let text = format!(
                "version = 1\n[action_space]\nname = \"{name}\"\nprompt = \"Delta End-Effector\"\n\
                 num_arms = 1\nproprio_dim = {proprio}\ndims = [{}]",
                dims.join(", ")
            );
            ActionSpaceFile::parse(&text, name).unwrap()
        })
        .to_vec()
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

pub(crate) fn open_storage(url: &str) -> Result<Storage, pollen_storage::Error> {
    Storage::open(url, &StorageConfig::default(), Arc::new(Silent))
}

pub(crate) fn open(runtime: &Runtime, config: &DataConfig) -> pollen_dataloader::Result<Arc<Data>> {
    let spaces = spaces();
    let data = Data::open(config, &spaces, SHAPE, &open_storage);
    runtime.block_on(data).map(Arc::new)
}

pub(crate) const GLOBAL_BATCH: usize = 24;

pub(crate) fn loader(
    runtime: &Runtime,
    data: &Arc<Data>,
    world: (usize, usize),
    first: u64,
) -> Loader {
    let seed = Seed::new(11);
    let args = LoaderArgs {
        mixture: Arc::new(data.mixture(seed).unwrap()),
        data: Arc::clone(data),
        seed,
        rank: world.0,
        world_size: world.1,
        global_batch: GLOBAL_BATCH,
        micro_batch: 4,
        first_sample: first,
    };
    Loader::start(args, runtime.handle()).unwrap()
}

/// Takes the micro-batches of `steps` steps.
pub(crate) fn take(loader: &mut Loader, steps: usize) -> Vec<HostBatch> {
    (0..steps * loader.micro_batches_per_step())
        .map(|_| loader.next_micro_batch().unwrap())
        .collect()
}
