//! What serving needs to know of a run's data, saved in every checkpoint as `contract.json`.

use pollen_dataloader::{Data, Instruction};
use pollen_processing::{
    DatasetContract, ImageContract, Normalization, ObservationContract, Padding, Prompt,
    TextContract, TextLength,
};
use sha2::{Digest, Sha256};

use crate::config::RunConfig;
use crate::error::Error;

/// Returns the contract's JSON.
pub(crate) fn contract_json(data: &Data, config: &RunConfig) -> Result<Vec<u8>, Error> {
    let path = &config.data.tokenizer;
    let tokenizer = std::fs::read(path)
        .map_err(|source| Error::File { path: path.display().to_string(), source })?;
    let datasets = data.datasets().iter().map(|dataset| {
        let space = dataset.action_space().clone();
        let contract = DatasetContract {
            normalization: Normalization::QuantilesClipped,
            action_stats: dataset.sidecar().action.clone(),
            proprio_stats: dataset.sidecar().proprio.clone().filter(|_| space.proprio_dim > 0),
            prompt: match dataset.config().instruction {
                Instruction::Raw => Prompt::Instruction,
                Instruction::Task | Instruction::Empty => {
                    Prompt::minimal(&space, &dataset.config().robot)
                }
            },
            frequency_hz: f64::from(dataset.frequency_hz()),
            action_space: space,
        };
        (dataset.name().to_owned(), contract)
    });
    let contract = ObservationContract {
        version: ObservationContract::VERSION,
        cameras: config.data.cameras.clone(),
        image: ImageContract::new(config.data.image_size, config.data.resize),
        text: TextContract {
            tokenizer_sha256: Sha256::digest(&tokenizer)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            florence_tokens: false,
            length: TextLength { max: config.data.text_length, padding: Padding::MaxLength },
        },
        datasets: datasets.collect(),
    };
    match contract.faults() {
        faults if faults.is_empty() => Ok(contract.to_json().into_bytes()),
        faults => Err(Error::Recipe(faults)),
    }
}
