//! Damaged and foreign files: a clear error that names tensor and file, and nothing half done.

use safetensors::Dtype;

use super::{Lab, Tensors, canonical, config, file, trained, with_buffers};

const NAME: &str = "dit.0.cross_attn.q_proj.weight";

fn source() -> Tensors {
    let config = config();
    with_buffers(canonical(&config), &config, 1000.0)
}

/// Imports a file that must fail, and checks that nothing was left.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let lab = Lab::with(bytes);
    let error = lab
        .import(&config(), &trained())
        .expect_err("a bad file")
        .to_string();
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
    assert!(!lab.exists("destination/model.safetensors.index.json"));
    assert!(!lab.exists("destination/model-00001-of-00001.safetensors"));
}

#[test]
fn a_missing_tensor_is_named() {
    let mut tensors = source();
    tensors.remove(NAME);
    let parts = [NAME, "missing in", "/source", "--allow-missing head"];
    refused(&file(&tensors), &parts);
}

#[test]
fn a_transposed_tensor_is_named() {
    let name = "dit.0.mlp.fc1.weight";
    let mut tensors = source();
    tensors.get_mut(name).expect("there").1.reverse();
    let parts = [
        name,
        "source/model.safetensors",
        "[24, 256]",
        "[256, 24]",
        "it is transposed",
    ];
    refused(&file(&tensors), &parts);
}

#[test]
fn another_type_is_named() {
    let mut tensors = source();
    tensors.get_mut(NAME).expect("there").0 = Dtype::F64;
    let parts = [NAME, "source/model.safetensors", "F64", "F32, BF16 or F16"];
    refused(&file(&tensors), &parts);
}

#[test]
fn a_cut_file_is_named() {
    let bytes = file(&source());
    let parts = ["source/model.safetensors", "tensor `", "cut off"];
    refused(&bytes[..bytes.len() - 1], &parts);
    refused(&bytes[..100], &["source/model.safetensors", "cut off"]);
    refused(&[], &["source/model.safetensors", "0 bytes"]);
}

#[test]
fn a_hostile_header_is_named() {
    let mut bytes = file(&source());
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&bytes, &["source/model.safetensors", "claims", "limit"]);
}

#[test]
fn values_that_are_no_numbers_are_named() {
    let mut tensors = source();
    tensors.get_mut(NAME).expect("there").2[3] = f32::NAN;
    let parts = [NAME, "source/model.safetensors", "NaN at element 3"];
    refused(&file(&tensors), &parts);
}

#[test]
fn tied_tables_must_be_equal() {
    let mut tensors = source();
    let name = "vlm.language_model.model.encoder.embed_tokens.weight";
    tensors.get_mut(name).expect("there").2[0] += 1.0;
    refused(&file(&tensors), &[name, "the same parameter"]);
}

#[test]
fn a_model_is_never_replaced() {
    let lab = Lab::with(&file(&source()));
    lab.import(&config(), &trained()).expect("fits");
    let error = lab.import(&config(), &trained()).expect_err("it is there");
    assert!(error.to_string().contains("holds weights already"));
    let _ = lab.imported("destination");
}

#[test]
fn pickles_and_empty_folders_say_what_to_do() {
    let lab = Lab::new();
    lab.write("source/readme", b"");
    let error = lab.open("source").expect_err("no weights").to_string();
    assert!(error.contains("model.safetensors.index.json"), "{error}");
    let error = lab.open("source/model.ckpt").expect_err("a pickle");
    assert!(error.to_string().contains("pickle-to-safetensors.py"));
}
