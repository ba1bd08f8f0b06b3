//! The features of a dataset: in `info.json`, as Arrow schema, and as Hugging Face metadata.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use parquet::schema::types::ColumnPath;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

/// What LeRobot adds to every frame, in its order.
pub(crate) const INDEX_COLUMNS: [&str; 4] = ["frame_index", "episode_index", "index", "task_index"];
pub(crate) const TIMESTAMP: &str = "timestamp";

/// A feature of numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberFeature {
    /// Name, `action` or `observation.state`.
    pub name: String,
    /// Numbers a frame.
    pub width: usize,
    /// A name for each number.
    pub names: Option<Vec<String>>,
}

/// A camera.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CameraFeature {
    /// Name, `observation.images.primary`.
    pub name: String,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// What a dataset is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// Frames a second.
    pub fps: f64,
    /// The robot.
    pub robot_type: String,
    /// Cameras, in the order of their columns.
    pub cameras: Vec<CameraFeature>,
    /// Numbers, in the order of their columns.
    pub numbers: Vec<NumberFeature>,
}

/// A JSON object that keeps its order.
pub(crate) struct Ordered<T>(pub(crate) Vec<(String, T)>);

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl DatasetSpec {
    /// Returns what `info.json` says of each feature.
    pub(crate) fn features(&self) -> Ordered<Value> {
        let mut features = Vec::new();
        for camera in &self.cameras {
            let feature = json!({
                "dtype": "image",
                "shape": [camera.height, camera.width, 3],
                "names": ["height", "width", "channels"],
            });
            features.push((camera.name.clone(), feature));
        }
        for number in &self.numbers {
            let feature = json!({
                "dtype": "float32", "shape": [number.width], "names": number.names,
            });
            features.push((number.name.clone(), feature));
        }
        let scalar = |dtype: &str| json!({"dtype": dtype, "shape": [1], "names": null});
        features.push((TIMESTAMP.into(), scalar("float32")));
        features.extend(INDEX_COLUMNS.map(|name| (name.into(), scalar("int64"))));
        Ordered(features)
    }

    /// Returns the schema of data files, with the metadata that readers without `info.json` use.
    pub(crate) fn arrow(&self) -> SchemaRef {
        let mut fields = Vec::new();
        for camera in &self.cameras {
            let kind = DataType::Struct(image_fields());
            fields.push(Field::new(&camera.name, kind, true));
        }
        for number in &self.numbers {
            let kind = if number.width == 1 {
                DataType::Float32
            } else {
                DataType::FixedSizeList(element(), number.width as i32)
            };
            fields.push(Field::new(&number.name, kind, true));
        }
        fields.push(Field::new(TIMESTAMP, DataType::Float32, true));
        fields.extend(INDEX_COLUMNS.map(|name| Field::new(name, DataType::Int64, true)));
        let metadata = HashMap::from([("huggingface".into(), self.hugging_face())]);
        Arc::new(Schema::new_with_metadata(fields, metadata))
    }

    /// Returns the value of the `huggingface` schema metadata.
    pub(crate) fn hugging_face(&self) -> String {
        let value = |dtype: &str| json!({"dtype": dtype, "_type": "Value"});
        let mut features = Vec::new();
        for camera in &self.cameras {
            features.push((camera.name.clone(), json!({"_type": "Image"})));
        }
        for number in &self.numbers {
            let feature = match number.width {
                1 => value("float32"),
                width => json!({"feature": value("float32"), "length": width, "_type": "List"}),
            };
            features.push((number.name.clone(), feature));
        }
        features.push((TIMESTAMP.into(), value("float32")));
        features.extend(INDEX_COLUMNS.map(|name| (name.into(), value("int64"))));
        let features = Ordered(vec![("features".to_string(), Ordered(features))]);
        let info = Ordered(vec![("info".to_string(), features)]);
        serde_json::to_string(&info).expect("its keys are strings")
    }

    /// Returns the leaf columns that hold images.
    pub(crate) fn image_leaves(&self) -> Vec<ColumnPath> {
        let leaf = |camera: &str, leaf: &str| ColumnPath::new(vec![camera.into(), leaf.into()]);
        let cameras = self.cameras.iter();
        let leaves = cameras.flat_map(|c| [leaf(&c.name, "bytes"), leaf(&c.name, "path")]);
        leaves.collect()
    }

    /// Returns the columns that are not images.
    pub(crate) fn number_columns(&self) -> Vec<&str> {
        let numbers = self.numbers.iter().map(|number| number.name.as_str());
        numbers.chain([TIMESTAMP]).chain(INDEX_COLUMNS).collect()
    }
}

/// Returns the fields of an image struct.
pub(crate) fn image_fields() -> Fields {
    Fields::from(vec![
        Field::new("bytes", DataType::Binary, true),
        Field::new("path", DataType::Utf8, true),
    ])
}

/// Returns the field of the items of a list of numbers.
pub(crate) fn element() -> Arc<Field> {
    Arc::new(Field::new("element", DataType::Float32, true))
}
