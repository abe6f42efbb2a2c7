//! Tables of text that stay readable in 100 columns: the first column to the left, figures to the right.

use std::fmt;

/// Rows under a header.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(header: [&str; N]) -> Table {
        Table { rows: vec![header.map(str::to_owned).to_vec()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let gap = widths[column] - cell.chars().count();
                match column {
                    0 => line.push_str(&format!("{cell}{:gap$}", "")),
                    _ => line.push_str(&format!("  {:gap$}{cell}", "")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
            if i == 0 {
                let full = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
                writeln!(f, "{}", "─".repeat(full))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["what", "rate"]);
        table.row(["get".into(), "1.23 M/s".into()]);
        table.row(["mixed".into(), "41 µs".into()]);
        assert_eq!(table.to_string(), "what       rate\n───────────────\nget    1.23 M/s\nmixed     41 µs\n");
    }
}
