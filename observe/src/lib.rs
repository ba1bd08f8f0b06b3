//! Events, the truth of a run, and their views: progress line, budget, summary
