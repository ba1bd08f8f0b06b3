//! Rotations in the representations that datasets store, converted through rotation matrices.
//!
//! Euler angles are roll, pitch, yaw about the fixed axes x, y, z: R = Rz(yaw) Ry(pitch) Rx(roll).

use serde::{Deserialize, Serialize};

type Matrix = [[f64; 3]; 3];

/// How a rotation is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotation {
    /// Roll, pitch, yaw in radians about the fixed axes x, y, z.
    Euler,
    /// Unit quaternion with the real part last: x, y, z, w.
    QuaternionXyzw,
    /// Unit quaternion with the real part first: w, x, y, z.
    QuaternionWxyz,
    /// Axis times angle in radians.
    AxisAngle,
    /// The first two columns of the matrix, one after the other (Zhou et al. 2019).
    Rot6d,
    /// The matrix, row by row.
    Matrix,
}

impl Rotation {
    /// Returns the numbers that it takes.
    pub fn width(self) -> usize {
        match self {
            Self::Euler | Self::AxisAngle => 3,
            Self::QuaternionXyzw | Self::QuaternionWxyz => 4,
            Self::Rot6d => 6,
            Self::Matrix => 9,
        }
    }

    /// Writes a rotation in another representation.
    ///
    /// `None` where the numbers are no rotation: a quaternion of length 0, columns on one line.
    ///
    /// # Shapes
    /// `values` is [`Self::width`], the result `to.width()`.
    pub fn convert(self, values: &[f32], to: Self) -> Option<Vec<f32>> {
        let wide: Vec<f64> = values.iter().copied().map(f64::from).collect();
        let matrix = self.to_matrix(&wide)?;
        let narrow = to.of_matrix(&matrix);
        Some(narrow.into_iter().map(|value| value as f32).collect())
    }

    fn to_matrix(self, v: &[f64]) -> Option<Matrix> {
        match self {
            Self::Euler => {
                let [(sr, cr), (sp, cp), (sy, cy)] = [0, 1, 2].map(|i| v[i].sin_cos());
                Some([
                    [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                    [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                    [-sp, cp * sr, cp * cr],
                ])
            }
            Self::QuaternionXyzw => of_quaternion([v[3], v[0], v[1], v[2]]),
            Self::QuaternionWxyz => of_quaternion([v[0], v[1], v[2], v[3]]),
            Self::AxisAngle => {
                let angle = length(v);
                // sin(a/2)/a tends to 1/2.
                let scale = if angle < 1e-12 {
                    0.5
                } else {
                    (angle / 2.0).sin() / angle
                };
                of_quaternion([
                    (angle / 2.0).cos(),
                    scale * v[0],
                    scale * v[1],
                    scale * v[2],
                ])
            }
            Self::Rot6d => {
                let first = unit([v[0], v[1], v[2]])?;
                let along = dot(first, [v[3], v[4], v[5]]);
                let second = unit([0, 1, 2].map(|i| v[3 + i] - along * first[i]))?;
                let third = cross(first, second);
                Some([0, 1, 2].map(|i| [first[i], second[i], third[i]]))
            }
            Self::Matrix => Some([0, 1, 2].map(|i| [v[3 * i], v[3 * i + 1], v[3 * i + 2]])),
        }
    }

    fn of_matrix(self, m: &Matrix) -> Vec<f64> {
        match self {
            Self::Euler => {
                let pitch = (-m[2][0]).clamp(-1.0, 1.0).asin();
                if m[2][0].abs() < 1.0 - 1e-9 {
                    vec![m[2][1].atan2(m[2][2]), pitch, m[1][0].atan2(m[0][0])]
                } else {
                    // Roll and yaw turn about one axis: all of it goes to yaw.
                    vec![0.0, pitch, (-m[0][1]).atan2(m[1][1])]
                }
            }
            Self::QuaternionXyzw => {
                let [w, x, y, z] = quaternion_of(m);
                vec![x, y, z, w]
            }
            Self::QuaternionWxyz => quaternion_of(m).to_vec(),
            Self::AxisAngle => {
                let [w, x, y, z] = quaternion_of(m);
                let sine = length(&[x, y, z]);
                let scale = if sine < 1e-12 {
                    2.0
                } else {
                    2.0 * sine.atan2(w) / sine
                };
                vec![scale * x, scale * y, scale * z]
            }
            Self::Rot6d => [0, 1]
                .into_iter()
                .flat_map(|column| [0, 1, 2].map(|row| m[row][column]))
                .collect(),
            Self::Matrix => m.iter().flatten().copied().collect(),
        }
    }
}

/// Brings an angle in radians into [-pi, pi).
pub(crate) fn wrap(angle: f32) -> f32 {
    use std::f64::consts::{PI, TAU};
    ((f64::from(angle) + PI).rem_euclid(TAU) - PI) as f32
}

fn of_quaternion(q: [f64; 4]) -> Option<Matrix> {
    let norm = length(&q);
    // Not a number goes on, so that the frame is reported where it is used.
    if norm < 1e-9 {
        return None;
    }
    let [w, x, y, z] = q.map(|part| part / norm);
    Some([
        [
            1.0 - 2.0 * (y * y + z * z),
            2.0 * (x * y - w * z),
            2.0 * (x * z + w * y),
        ],
        [
            2.0 * (x * y + w * z),
            1.0 - 2.0 * (x * x + z * z),
            2.0 * (y * z - w * x),
        ],
        [
            2.0 * (x * z - w * y),
            2.0 * (y * z + w * x),
            1.0 - 2.0 * (x * x + y * y),
        ],
    ])
}

/// Returns w, x, y, z with w at least 0; the largest part is found first, so that nothing is
/// divided by a small number.
fn quaternion_of(m: &Matrix) -> [f64; 4] {
    let trace = m[0][0] + m[1][1] + m[2][2];
    let q = if trace > 0.0 {
        let s = (trace + 1.0).sqrt() * 2.0;
        [
            s / 4.0,
            (m[2][1] - m[1][2]) / s,
            (m[0][2] - m[2][0]) / s,
            (m[1][0] - m[0][1]) / s,
        ]
    } else {
        let i = (0..3).fold(0, |best, i| if m[i][i] > m[best][best] { i } else { best });
        let (j, k) = ((i + 1) % 3, (i + 2) % 3);
        let s = (1.0 + m[i][i] - m[j][j] - m[k][k]).max(0.0).sqrt() * 2.0;
        let mut q = [(m[k][j] - m[j][k]) / s, 0.0, 0.0, 0.0];
        q[1 + i] = s / 4.0;
        q[1 + j] = (m[j][i] + m[i][j]) / s;
        q[1 + k] = (m[k][i] + m[i][k]) / s;
        q
    };
    if q[0] < 0.0 { q.map(|part| -part) } else { q }
}

fn length(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    (0..3).map(|i| a[i] * b[i]).sum()
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]
}

fn unit(v: [f64; 3]) -> Option<[f64; 3]> {
    let norm = length(&v);
    // Not a number goes on, as above.
    if norm < 1e-9 {
        None
    } else {
        Some(v.map(|part| part / norm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f32::consts::{FRAC_PI_2, PI};

    const ALL: [Rotation; 6] = [
        Rotation::Euler,
        Rotation::QuaternionXyzw,
        Rotation::QuaternionWxyz,
        Rotation::AxisAngle,
        Rotation::Rot6d,
        Rotation::Matrix,
    ];

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-6)
    }

    /// A quarter turn about z takes x to y: the same in every representation, by hand.
    #[test]
    fn a_quarter_turn_by_hand() {
        let half = std::f32::consts::FRAC_1_SQRT_2;
        let by_hand: [&[f32]; 6] = [
            &[0.0, 0.0, FRAC_PI_2],
            &[0.0, 0.0, half, half],
            &[half, 0.0, 0.0, half],
            &[0.0, 0.0, FRAC_PI_2],
            &[0.0, 1.0, 0.0, -1.0, 0.0, 0.0],
            &[0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        ];
        for (from, values) in ALL.iter().zip(by_hand) {
            assert_eq!(from.width(), values.len());
            for (to, expected) in ALL.iter().zip(by_hand) {
                let found = from.convert(values, *to).expect("a rotation");
                assert!(close(&found, expected), "{from:?} -> {to:?}: {found:?}");
            }
        }
    }

    /// Fixed axes: first roll, then pitch, then yaw. x -> x -> -z -> -z under (90, 90, 90) degrees.
    #[test]
    fn the_order_of_axes() {
        let angles = [0.0, FRAC_PI_2, FRAC_PI_2];
        let matrix = Rotation::Euler.convert(&angles, Rotation::Matrix);
        let matrix = matrix.expect("a rotation");
        // Pitch takes x to -z, yaw leaves z alone; y goes to -x by yaw.
        assert!(close(&[matrix[0], matrix[3], matrix[6]], &[0.0, 0.0, -1.0]));
        assert!(close(&[matrix[1], matrix[4], matrix[7]], &[-1.0, 0.0, 0.0]));
    }

    #[test]
    fn every_pair_comes_back() {
        let mut values = vec![0.0; 300];
        pollen_core::Seed::new(3).draws().fill_normal(&mut values);
        for angles in values.chunks_exact(3) {
            let start = [angles[0], angles[1] * 0.4, angles[2]];
            let matrix = Rotation::Euler.convert(&start, Rotation::Matrix);
            let matrix = matrix.expect("a rotation");
            for via in ALL {
                let there = Rotation::Matrix.convert(&matrix, via).expect("a rotation");
                let back = via.convert(&there, Rotation::Matrix).expect("a rotation");
                assert!(close(&back, &matrix), "{via:?}: {back:?} {matrix:?}");
            }
        }
    }

    #[test]
    fn the_edges() {
        let upright = Rotation::Euler.convert(&[0.3, FRAC_PI_2, 0.5], Rotation::Matrix);
        let upright = upright.expect("a rotation");
        let angles = Rotation::Matrix
            .convert(&upright, Rotation::Euler)
            .expect("one");
        let again = Rotation::Euler
            .convert(&angles, Rotation::Matrix)
            .expect("one");
        assert!(close(&again, &upright), "{again:?} {upright:?}");
        let still = Rotation::AxisAngle.convert(&[0.0; 3], Rotation::QuaternionWxyz);
        assert_eq!(still.expect("a rotation"), [1.0, 0.0, 0.0, 0.0]);
        assert!(
            Rotation::QuaternionXyzw
                .convert(&[0.0; 4], Rotation::Euler)
                .is_none()
        );
        let line = [1.0, 0.0, 0.0, 2.0, 0.0, 0.0];
        assert!(Rotation::Rot6d.convert(&line, Rotation::Euler).is_none());
        let unknown = Rotation::AxisAngle.convert(&[f32::NAN, 0.0, 0.0], Rotation::Euler);
        assert!(unknown.expect("goes on").iter().any(|x| x.is_nan()));
        assert!((wrap(PI + 0.1) + PI - 0.1).abs() < 1e-6);
        assert_eq!(wrap(0.5), 0.5);
    }
}
