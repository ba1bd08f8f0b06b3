//! What training and serving do to an observation: pixels, normalisation, prompt, tokens
