//! The Universal Scalability Law (Gunther, "Guerrilla Capacity Planning", 2007), fitted to measured rates.
//!
//! ```text
//!                 λ n
//!   X(n) = ─────────────────────────      σ  share of the work that queues behind others (contention)
//!           1 + σ (n−1) + κ n (n−1)       κ  cost of agreeing, paid between every pair of workers (coherency)
//! ```
//!
//! Least squares on the rates, σ and κ not negative. The reciprocal n/X is linear in 1/λ, σ/λ, κ/λ, so a linear fit
//! gives the start and Gauss-Newton steps do the rest; a coefficient that would become negative is left out, and of all
//! such models the one that fits best is taken. A model never has more coefficients than there are distinct counts of
//! workers: two counts tell λ and σ only.

use serde::Serialize;

/// What the law says about a machine and a load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Usl {
    /// Rate of one worker alone.
    pub(crate) lambda: f64,
    /// Contention.
    pub(crate) sigma: f64,
    /// Coherency.
    pub(crate) kappa: f64,
}

/// Where more workers stop helping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    /// Beyond so many workers the rate falls.
    Peak { workers: f64, rate: f64 },
    /// The rate grows towards this for ever.
    Ceiling(f64),
    /// The rate grows in proportion.
    None,
}

/// Coefficients of n/X: of 1, n−1 and n(n−1).
type Terms = [f64; 3];

const STEPS: usize = 60;

impl Usl {
    /// The law that fits best to (workers, rate), or `None` without a single positive rate.
    pub(crate) fn fit(points: &[(f64, f64)]) -> Option<Usl> {
        let points: Vec<(f64, f64)> = points.iter().copied().filter(|&(n, rate)| n >= 1.0 && rate > 0.0).collect();
        let mut counts: Vec<f64> = points.iter().map(|p| p.0).collect();
        counts.sort_by(f64::total_cmp);
        counts.dedup();
        let models: &[&[usize]] = match counts.len() {
            0 => return None,
            1 => &[&[0]],
            2 => &[&[0], &[0, 1]],
            _ => &[&[0], &[0, 1], &[0, 2], &[0, 1, 2]],
        };
        models
            .iter()
            .filter_map(|model| solve(&points, model))
            .filter(|terms| terms[0] > 0.0 && terms[1] >= 0.0 && terms[2] >= 0.0)
            .min_by(|a, b| error(&points, a).total_cmp(&error(&points, b)))
            .map(|[a, b, c]| Usl { lambda: 1.0 / a, sigma: b / a, kappa: c / a })
    }

    /// The rate of `workers`.
    pub(crate) fn at(&self, workers: f64) -> f64 {
        let others = workers - 1.0;
        self.lambda * workers / (1.0 + self.sigma * others + self.kappa * workers * others)
    }

    /// Where more workers stop helping.
    pub(crate) fn limit(&self) -> Limit {
        if self.kappa > 0.0 {
            let workers = ((1.0 - self.sigma).max(0.0) / self.kappa).sqrt().max(1.0);
            Limit::Peak { workers, rate: self.at(workers) }
        } else if self.sigma > 0.0 {
            Limit::Ceiling(self.lambda / self.sigma)
        } else {
            Limit::None
        }
    }
}

fn basis(n: f64) -> Terms {
    [1.0, n - 1.0, n * (n - 1.0)]
}

fn rate(terms: &Terms, n: f64) -> f64 {
    n / basis(n).iter().zip(terms).map(|(x, t)| x * t).sum::<f64>()
}

fn error(points: &[(f64, f64)], terms: &Terms) -> f64 {
    points.iter().map(|&(n, x)| (x - rate(terms, n)).powi(2)).sum()
}

/// Fits the terms whose numbers are in `model`; the others are 0.
fn solve(points: &[(f64, f64)], model: &[usize]) -> Option<Terms> {
    // The start: n/X itself, weighted so that errors count as errors of X.
    let mut terms = [0.0; 3];
    let start = least_squares(
        points.iter().map(|&(n, x)| {
            let weight = x * x / n;
            (basis(n).map(|b| b * weight), n / x * weight)
        }),
        model,
    )?;
    model.iter().zip(start).for_each(|(&i, t)| terms[i] = t);
    for _ in 0..STEPS {
        let step = least_squares(
            points.iter().map(|&(n, x)| {
                let now = rate(&terms, n);
                (basis(n).map(|b| -b * now * now / n), x - now)
            }),
            model,
        )?;
        let before = error(points, &terms);
        // A step that makes it worse is shortened; when none helps, this is the minimum.
        let better = (0..20).find_map(|halvings| {
            let mut next = terms;
            model.iter().zip(step).for_each(|(&i, d)| next[i] += d * 0.5f64.powi(halvings));
            (next[0] > 0.0 && error(points, &next) < before).then_some(next)
        });
        match better {
            Some(next) => terms = next,
            None => break,
        }
    }
    Some(terms)
}

/// Solves the normal equations of rows (coefficients, target) for the columns in `model`.
fn least_squares(rows: impl Iterator<Item = (Terms, f64)>, model: &[usize]) -> Option<Terms> {
    let size = model.len();
    let mut matrix = [[0.0; 4]; 3];
    for (coefficients, target) in rows {
        for (i, &p) in model.iter().enumerate() {
            for (j, &q) in model.iter().enumerate() {
                matrix[i][j] += coefficients[p] * coefficients[q];
            }
            matrix[i][3] += coefficients[p] * target;
        }
    }
    for column in 0..size {
        let pivot = (column..size).max_by(|&a, &b| matrix[a][column].abs().total_cmp(&matrix[b][column].abs()))?;
        matrix.swap(column, pivot);
        let head = matrix[column];
        if head[column] == 0.0 || !head[column].is_finite() {
            return None;
        }
        for row in matrix.iter_mut().take(size).skip(column + 1) {
            let factor = row[column] / head[column];
            row.iter_mut().zip(head).for_each(|(cell, above)| *cell -= factor * above);
        }
    }
    let mut solution = [0.0; 3];
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|j| matrix[row][j] * solution[j]).sum();
        solution[row] = (matrix[row][3] - known) / matrix[row][row];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(law: Usl, counts: &[f64]) -> Vec<(f64, f64)> {
        counts.iter().map(|&n| (n, law.at(n))).collect()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-4 * b.abs().max(1e-3)
    }

    #[test]
    fn known_parameters_are_recovered() {
        for (lambda, sigma, kappa) in
            [(7e6, 0.02, 0.0004), (1.0, 0.3, 0.01), (995.6, 0.0267, 0.000_769), (5.0, 0.1, 0.0)]
        {
            let law = Usl { lambda, sigma, kappa };
            let fit = Usl::fit(&points(law, &[1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 32.0])).unwrap();
            assert!(close(fit.lambda, lambda) && close(fit.sigma, sigma) && close(fit.kappa, kappa), "{law:?} {fit:?}");
        }
    }

    #[test]
    fn noise_moves_the_parameters_little() {
        let law = Usl { lambda: 10.0, sigma: 0.05, kappa: 0.001 };
        let mut noisy = points(law, &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]);
        noisy.iter_mut().enumerate().for_each(|(i, p)| p.1 *= if i % 2 == 0 { 1.01 } else { 0.99 });
        let fit = Usl::fit(&noisy).unwrap();
        assert!((fit.lambda / 10.0 - 1.0).abs() < 0.05 && (fit.sigma - 0.05).abs() < 0.02, "{fit:?}");
    }

    #[test]
    fn a_speed_up_beyond_the_ideal_gives_no_negative_cost() {
        let fit = Usl::fit(&[(1.0, 1.0), (2.0, 2.2), (4.0, 4.5)]).unwrap();
        assert!(fit.sigma == 0.0 && fit.kappa == 0.0 && fit.limit() == Limit::None, "{fit:?}");
    }

    #[test]
    fn few_points_give_a_smaller_model() {
        assert_eq!(Usl::fit(&[]), None);
        let one = Usl::fit(&[(1.0, 3.0)]).unwrap();
        assert!(close(one.lambda, 3.0) && one.sigma == 0.0);
        let two = Usl::fit(&[(1.0, 3.0), (2.0, 5.0)]).unwrap();
        assert!(close(two.lambda, 3.0) && close(two.sigma, 0.2) && two.kappa == 0.0, "{two:?}");
    }

    #[test]
    fn the_peak_lies_where_the_law_says() {
        let law = Usl { lambda: 1.0, sigma: 0.0, kappa: 0.01 };
        assert_eq!(law.limit(), Limit::Peak { workers: 10.0, rate: law.at(10.0) });
        assert!(law.at(10.0) > law.at(9.0) && law.at(10.0) > law.at(11.0));
        assert_eq!(Usl { lambda: 2.0, sigma: 0.5, kappa: 0.0 }.limit(), Limit::Ceiling(4.0));
    }
}
