//! Text to token ids, by the `tokenizers` library.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tokenizers::AddedToken;

use crate::error::Error;

/// How far the texts of a batch are padded, always on the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// To the largest length allowed (pretraining).
    MaxLength,
    /// To the longest text of the batch (finetuning).
    Longest,
}

/// Length of texts in ids, special ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextLength {
    /// Longer texts are cut; the last id stays `</s>`.
    pub max: usize,
    /// How far shorter ones are padded.
    pub padding: Padding,
}

/// The token ids of a batch.
///
/// # Shapes
/// `ids` and `mask` are [rows, length], row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Ids, `<pad>` behind the text.
    pub ids: Vec<u32>,
    /// True where there is text.
    pub mask: Vec<bool>,
    /// Number of texts.
    pub rows: usize,
    /// Ids per text.
    pub length: usize,
}

impl TokenBatch {
    /// Pads texts that are already ids. `pad` comes from [`Tokenizer::pad`].
    pub fn padded(texts: &[Vec<u32>], pad: u32, length: TextLength) -> Self {
        let longest = texts.iter().map(Vec::len).max().unwrap_or_default();
        let width = match length.padding {
            Padding::MaxLength => length.max,
            Padding::Longest => longest,
        };
        debug_assert!(longest <= width, "texts are cut when they are encoded");
        let mut batch = Self {
            ids: Vec::with_capacity(texts.len() * width),
            mask: Vec::with_capacity(texts.len() * width),
            rows: texts.len(),
            length: width,
        };
        for ids in texts {
            batch.ids.extend_from_slice(ids);
            batch.ids.resize(batch.ids.len() + width - ids.len(), pad);
            batch.mask.resize(batch.mask.len() + ids.len(), true);
            batch.mask.resize(batch.ids.len(), false);
        }
        batch
    }
}

/// A tokenizer with `<s>`, `</s>` and `<pad>`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    origin: String,
    pad: u32,
    end: u32,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` file.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let origin = path.display().to_string();
        match std::fs::read(path) {
            Ok(bytes) => Self::from_bytes(&bytes, &origin),
            Err(error) => Err(Error::Tokenizer {
                origin,
                reason: "cannot be read".into(),
                source: Some(Box::new(error)),
            }),
        }
    }

    /// Reads the bytes of a `tokenizer.json`; `origin` names them in errors. Padding and truncation
    /// written in the file are ignored.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let error = |reason: &str, source| Error::Tokenizer {
            origin: origin.into(),
            reason: reason.into(),
            source,
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|source| error("not a file of the `tokenizers` library", Some(source)))?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|source| error("truncation cannot be switched off", Some(source)))?;
        let special = |token: &str| {
            let id = inner.token_to_id(token);
            id.ok_or_else(|| error(&format!("has no `{token}`; add it to the file"), None))
        };
        let (start, end, pad) = (special("<s>")?, special("</s>")?, special("<pad>")?);
        let tokenizer = Self {
            inner,
            origin: origin.into(),
            pad,
            end,
        };
        if tokenizer.encode("", usize::MAX)? == [start, end] {
            Ok(tokenizer)
        } else {
            Err(error(
                "does not put `<s>` before and `</s>` behind a text; give it such a post-processor",
                None,
            ))
        }
    }

    /// Appends special tokens behind the vocabulary, in order.
    pub fn with_special_tokens(
        mut self,
        tokens: impl IntoIterator<Item = String>,
    ) -> Result<Self, Error> {
        for token in tokens {
            let next = self.vocabulary_size();
            let added = AddedToken::from(token.as_str(), true);
            let outcome = self.inner.add_special_tokens([added]);
            if outcome.is_err() || self.inner.token_to_id(&token) != Some(next as u32) {
                return Err(Error::Tokenizer {
                    origin: self.origin,
                    reason: format!("`{token}` cannot be appended as id {next}"),
                    source: outcome.err(),
                });
            }
        }
        Ok(self)
    }

    /// Returns the number of ids. The model's table has one row more, `<Flow>`.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Returns the id that fills up short texts.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Returns the ids of a text with `<s>` and `</s>`, cut to `max` of them.
    pub fn encode(&self, text: &str, max: usize) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, true)
            .map_err(|source| Error::Tokenizer {
                origin: self.origin.clone(),
                reason: format!("cannot encode {text:?}"),
                source: Some(source),
            })?;
        let mut ids = encoding.get_ids().to_vec();
        if ids.len() > max {
            ids.truncate(max);
            if let Some(last) = ids.last_mut() {
                *last = self.end;
            }
        }
        Ok(ids)
    }

    /// Returns the ids of a batch of texts.
    pub fn encode_batch<S: AsRef<str>>(
        &self,
        texts: &[S],
        length: TextLength,
    ) -> Result<TokenBatch, Error> {
        let texts = texts
            .iter()
            .map(|text| self.encode(text.as_ref(), length.max))
            .collect::<Result<Vec<Vec<u32>>, Error>>()?;
        Ok(TokenBatch::padded(&texts, self.pad, length))
    }
}

/// Returns the 1,024 tokens that Florence-2 appends to BART's vocabulary, in order of their ids.
pub fn florence_tokens() -> impl Iterator<Item = String> {
    let before = ["<od>", "</od>", "<ocr>", "</ocr>"];
    // "desciption" is how the tokens are spelled.
    let after = [
        "<cap>",
        "</cap>",
        "<ncap>",
        "</ncap>",
        "<dcap>",
        "</dcap>",
        "<grounding>",
        "</grounding>",
        "<seg>",
        "</seg>",
        "<sep>",
        "<region_cap>",
        "</region_cap>",
        "<region_to_desciption>",
        "</region_to_desciption>",
        "<proposal>",
        "</proposal>",
        "<poly>",
        "</poly>",
        "<and>",
    ];
    let locations = (0..1000).map(|i| format!("<loc_{i}>"));
    let (before, after) = (before.map(str::to_owned), after.map(str::to_owned));
    before.into_iter().chain(locations).chain(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::prompt::Prompt;
    use serde_json::Value;

    const BART: &[u8] = include_bytes!("../../configs/tokenizers/bart.json");
    const DEMO: &[u8] = include_bytes!("../../demo/tokenizer.json");

    fn florence() -> Tokenizer {
        Tokenizer::from_bytes(BART, "bart.json")
            .and_then(|bart| bart.with_special_tokens(florence_tokens()))
            .expect("the committed file")
    }

    fn numbers(value: &Value) -> Vec<u32> {
        let items = value.as_array().expect("a list").iter();
        items.map(|id| id.as_u64().expect("an id") as u32).collect()
    }

    fn flags(value: &Value) -> Vec<bool> {
        numbers(value).into_iter().map(|flag| flag == 1).collect()
    }

    fn flat(value: &Value, row: impl Fn(&Value) -> Vec<u32>) -> Vec<u32> {
        value
            .as_array()
            .expect("rows")
            .iter()
            .flat_map(row)
            .collect()
    }

    #[test]
    fn golden_prompt_tokens() {
        let file: Value =
            serde_json::from_slice(&golden::read("prompt_tokens.json")).expect("valid JSON");
        let tokenizer = florence();
        let size = file["vocabulary"].as_u64().expect("a number") as usize;
        assert_eq!(
            tokenizer.vocabulary_size() + 1,
            size,
            "`<Flow>` is the model's"
        );
        for (token, id) in file["special_ids"].as_object().expect("ids") {
            let expected = (token != "<Flow>").then(|| id.as_u64().expect("an id") as u32);
            assert_eq!(tokenizer.inner.token_to_id(token), expected, "{token}");
        }
        let lengths = ["finetuning", "pretraining"]
            .map(|path| file[path]["max_length"].as_u64().expect("a number") as usize);
        let mut prompts = 0;
        for case in file["cases"].as_array().expect("cases") {
            let text = |key: &str| case[key].as_str().expect("a text").to_owned();
            let robot = case["robot_name"].as_str().unwrap_or("Franka Panda");
            let space = case["action_space"]
                .as_str()
                .unwrap_or("Delta End-Effector");
            let minimal = Prompt::Minimal {
                num_arms: case["num_arms"].as_u64().unwrap_or(1) as u32,
                robot: robot.into(),
                action_space: space.into(),
            };
            let style = text("style");
            let prompt = match style.as_str() {
                "minimal" => minimal.text(&text("instruction")),
                "none" => Prompt::Instruction.text(&text("instruction")),
                _ => text("prompt"), // styles that are not used; their ids are still compared
            };
            assert_eq!(prompt, text("prompt"));
            prompts += usize::from(style == "minimal");
            let ids = numbers(&case["ids"]);
            match text("path").as_str() {
                "finetuning" => {
                    assert_eq!(tokenizer.encode(&prompt, lengths[0]).expect("ids"), ids);
                }
                "prompt function" => {
                    assert_eq!(tokenizer.encode(&prompt, usize::MAX).expect("ids"), ids);
                    let cut = tokenizer.encode(&prompt, lengths[1]).expect("ids");
                    assert_eq!(cut, numbers(&case["ids_max_50"]));
                }
                _ => {
                    let length = TextLength {
                        max: lengths[1],
                        padding: Padding::MaxLength,
                    };
                    let batch = tokenizer.encode_batch(&[prompt], length).expect("ids");
                    assert_eq!((batch.rows, batch.length), (1, lengths[1]));
                    assert_eq!(batch.ids, ids);
                    assert_eq!(batch.mask, flags(&case["attention_mask"]));
                }
            }
        }
        assert!(prompts >= 31, "prompts are missing");

        let batch = &file["batch"];
        let texts: Vec<&str> = batch["prompts"]
            .as_array()
            .expect("texts")
            .iter()
            .map(|text| text.as_str().expect("a text"))
            .collect();
        let length = TextLength {
            max: lengths[0],
            padding: Padding::Longest,
        };
        let ours = tokenizer.encode_batch(&texts, length).expect("ids");
        assert_eq!(ours.ids, flat(&batch["ids"], numbers));
        let mask = flat(&batch["attention_mask"], numbers);
        assert_eq!(
            ours.mask,
            mask.iter().map(|&m| m == 1).collect::<Vec<bool>>()
        );
        assert_eq!(ours.rows, texts.len());
    }

    #[test]
    fn florence_has_1024_tokens_of_its_own() {
        let tokens: Vec<String> = florence_tokens().collect();
        assert_eq!((tokens.len(), tokens[4].as_str()), (1024, "<loc_0>"));
        let bart = Tokenizer::from_bytes(BART, "bart.json").expect("the committed file");
        assert_eq!(bart.vocabulary_size(), 50_265);
        assert_eq!(
            bart.encode("Hello world!", 9).expect("ids"),
            [0, 31414, 232, 328, 2]
        );
    }

    #[test]
    fn tokens_that_exist_cannot_be_appended() {
        let error = florence()
            .with_special_tokens(["<od>".to_owned()])
            .expect_err("exists");
        assert!(
            error
                .to_string()
                .contains("`<od>` cannot be appended as id 51289"),
            "{error}"
        );
    }

    #[test]
    fn the_demo_tokenizer_fits_the_demo_prompts() {
        let tokenizer = Tokenizer::from_bytes(DEMO, "demo").expect("the committed file");
        assert_eq!(tokenizer.vocabulary_size(), 320);
        let prompt = Prompt::Minimal {
            num_arms: 2,
            robot: "Franka Panda".into(),
            action_space: "Delta End-Effector".into(),
        };
        let text = prompt.text("hand the hammer over to the other arm");
        let ids = tokenizer.encode(&text, usize::MAX).expect("ids");
        assert!(ids.len() <= 50, "{} ids are cut in pretraining", ids.len());
        assert_eq!((ids[0], ids[ids.len() - 1]), (0, 2));
        // Any other text is bytes at worst, never unknown.
        let ids = tokenizer.encode("na\u{ef}ve \u{1f916}", 99).expect("ids");
        assert!(!ids.contains(&3), "{ids:?}");
    }

    #[test]
    fn a_tokenizer_without_the_special_tokens_is_refused() {
        let text = std::str::from_utf8(DEMO).expect("JSON");
        let error = Tokenizer::from_bytes(text.replace("<pad>", "<fill>").as_bytes(), "x.json")
            .expect_err("no pad");
        assert_eq!(
            error.to_string(),
            "tokenizer x.json: has no `<pad>`; add it to the file"
        );
        let mut bare: Value = serde_json::from_slice(DEMO).expect("JSON");
        bare["post_processor"] = Value::Null;
        let error = Tokenizer::from_bytes(bare.to_string().as_bytes(), "x.json")
            .expect_err("no post-processor");
        assert!(error.to_string().contains("post-processor"), "{error}");
        let error = Tokenizer::from_bytes(b"{}", "x.json").expect_err("not a tokenizer");
        assert!(
            error.to_string().contains("`tokenizers` library"),
            "{error}"
        );
        let error = Tokenizer::from_file(Path::new("/no/such/file")).expect_err("no file");
        assert!(error.to_string().contains("cannot be read"), "{error}");
    }

    #[test]
    fn an_empty_batch_has_no_ids() {
        let length = TextLength {
            max: 5,
            padding: Padding::Longest,
        };
        let batch = TokenBatch::padded(&[], 1, length);
        assert_eq!((batch.rows, batch.length, batch.ids.len()), (0, 0, 0));
    }
}
