//! Groups the samples of a batch by action space, so that each space's modules see their rows only.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Rows of a batch, grouped by action space.
#[derive(Clone, Debug)]
pub(crate) struct RowGroups {
    groups: Vec<(usize, Tensor<1, Int>)>,
    /// Brings the rows of all groups, one group after another, back in their order.
    restore: Tensor<1, Int>,
}

impl RowGroups {
    /// Groups rows by the space of each.
    pub(crate) fn new(spaces: &[usize], device: &Device) -> Self {
        let mut present = spaces.to_vec();
        present.sort_unstable();
        present.dedup();
        let mut restore = vec![0_i64; spaces.len()];
        let mut next = 0;
        let mut groups = Vec::with_capacity(present.len());
        for space in present {
            let rows: Vec<i64> = (0..spaces.len())
                .filter(|&row| spaces[row] == space)
                .map(|row| row as i64)
                .collect();
            for &row in &rows {
                restore[row as usize] = next;
                next += 1;
            }
            groups.push((space, indices(rows, device)));
        }
        Self {
            groups,
            restore: indices(restore, device),
        }
    }

    /// Returns the spaces that occur, in order.
    pub(crate) fn spaces(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().map(|(space, _)| *space)
    }

    /// Applies `f` to the rows of each space and joins the results in the order of the batch.
    ///
    /// # Shapes
    /// `x: [batch, ..]`; `f` keeps the number of rows.
    pub(crate) fn map<const D: usize, const E: usize>(
        &self,
        x: Tensor<D>,
        mut f: impl FnMut(usize, Tensor<D>) -> Tensor<E>,
    ) -> Tensor<E> {
        if let [(space, _)] = &self.groups[..] {
            return f(*space, x);
        }
        let parts = self
            .groups
            .iter()
            .map(|(space, rows)| f(*space, x.clone().select(0, rows.clone())))
            .collect();
        Tensor::cat(parts, 0).select(0, self.restore.clone())
    }
}

fn indices(rows: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), device)
}
