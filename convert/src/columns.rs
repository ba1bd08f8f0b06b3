//! Numbers, images and text out of Arrow columns of whatever type another program chose.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::DataType;
use bytes::Bytes;

use crate::episode::Matrix;

/// Returns a column of numbers or lists of numbers.
pub(crate) fn numbers(parts: &[RecordBatch], name: &str) -> Result<Matrix, String> {
    let mut values = Vec::new();
    let mut rows = 0;
    for part in parts {
        let column = part.column_by_name(name).ok_or("the column is missing")?;
        flatten(column, &mut values)?;
        rows += part.num_rows();
    }
    let width = values.len().checked_div(rows).unwrap_or(0);
    if width == 0 || width * rows != values.len() {
        return Err(format!("{} values are not {rows} equal rows", values.len()));
    }
    Ok(Matrix { width, values })
}

/// Appends the numbers of an array; lists are laid out one after the other.
fn flatten(array: &ArrayRef, values: &mut Vec<f32>) -> Result<(), String> {
    if array.null_count() > 0 {
        return Err("a value is missing".into());
    }
    macro_rules! primitive {
        ($kind:ty, $convert:expr) => {{
            let numbers = array.as_primitive::<$kind>().values();
            values.extend(numbers.iter().copied().map($convert));
        }};
    }
    match array.data_type() {
        DataType::Float32 => primitive!(Float32Type, f32::from),
        DataType::Float64 => primitive!(Float64Type, |v| v as f32),
        DataType::Int8 => primitive!(Int8Type, f32::from),
        DataType::Int16 => primitive!(Int16Type, f32::from),
        DataType::Int32 => primitive!(Int32Type, |v| v as f32),
        DataType::Int64 => primitive!(Int64Type, |v| v as f32),
        DataType::UInt8 => primitive!(UInt8Type, f32::from),
        DataType::Boolean => {
            let array = array.as_boolean();
            values.extend(array.values().iter().map(|v| f32::from(u8::from(v))));
        }
        DataType::FixedSizeList(..) => flatten(array.as_fixed_size_list().values(), values)?,
        DataType::List(_) | DataType::LargeList(_) => {
            let rows = array.len();
            for row in 0..rows {
                let list = match array.as_list_opt::<i32>() {
                    Some(list) => list.value(row),
                    None => array.as_list::<i64>().value(row),
                };
                flatten(&list, values)?;
            }
        }
        other => return Err(format!("{other} is no type of numbers")),
    }
    Ok(())
}

/// Returns a column of images: a struct with `bytes`, or bytes alone.
pub(crate) fn images(parts: &[RecordBatch], name: &str) -> Result<Vec<Bytes>, String> {
    let mut files = Vec::new();
    for part in parts {
        let column = part.column_by_name(name).ok_or("the column is missing")?;
        let bytes = match column.as_struct_opt() {
            Some(image) => image
                .column_by_name("bytes")
                .ok_or("the struct has no `bytes`")?,
            None => column,
        };
        for row in 0..bytes.len() {
            if bytes.is_null(row) {
                return Err(format!(
                    "the image of row {row} is a path to another file; embed the images first"
                ));
            }
            let file = if let Some(array) = bytes.as_binary_opt::<i32>() {
                array.value(row)
            } else if let Some(array) = bytes.as_binary_opt::<i64>() {
                array.value(row)
            } else if let Some(array) = bytes.as_binary_view_opt() {
                array.value(row)
            } else {
                return Err(format!("{} is no type of images", bytes.data_type()));
            };
            files.push(Bytes::copy_from_slice(file));
        }
    }
    Ok(files)
}

/// Returns the first text of a column that is not empty.
pub(crate) fn first_text(parts: &[RecordBatch], name: &str) -> Option<String> {
    parts.iter().find_map(|part| {
        texts(part.column_by_name(name)?)
            .into_iter()
            .find(|t| !t.is_empty())
    })
}

/// Returns the texts of a column; what is no text is empty.
pub(crate) fn texts(column: &ArrayRef) -> Vec<String> {
    if let Some(array) = column.as_string_opt::<i32>() {
        return array
            .iter()
            .map(|text| text.unwrap_or_default().into())
            .collect();
    }
    if let Some(array) = column.as_string_opt::<i64>() {
        return array
            .iter()
            .map(|text| text.unwrap_or_default().into())
            .collect();
    }
    vec![String::new(); column.len()]
}

/// Returns a column of 64-bit numbers.
pub(crate) fn doubles(batch: &RecordBatch, name: &str) -> Result<Vec<f64>, String> {
    let column = batch.column_by_name(name).ok_or("the column is missing")?;
    if column.null_count() > 0 {
        return Err("a value is missing".into());
    }
    if let Some(column) = column.as_primitive_opt::<Float64Type>() {
        return Ok(column.values().to_vec());
    }
    match column.as_primitive_opt::<Int64Type>() {
        Some(column) => Ok(column.values().iter().map(|value| *value as f64).collect()),
        None => Err(format!("{} in place of numbers", column.data_type())),
    }
}
