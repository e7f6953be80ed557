//! Quicksort as one writes it: Hoare's partition around the middle, recursion, insertion for what is short.

use crate::{Kind, Numbers, Unit, Work};
use std::hint::black_box;

pub(crate) const QUICKSORT: Work = Work {
    name: "quicksort",
    phrase: "16384 numbers of 32 bits sorted",
    kind: Kind::Compute,
    operations: 1,
    sum: 0xf601_81a8_8279_0421,
    prepare,
};

const LEN: usize = 16 << 10;

fn prepare() -> Unit {
    let mut data = vec![0u32; LEN];
    Box::new(move || {
        // Made anew each time, which is a hundredth of the work and spares a copy by the C library.
        let mut numbers = Numbers::new(black_box(8));
        data.iter_mut().for_each(|number| *number = (numbers.next() >> 32) as u32);
        sort(black_box(data.as_mut_slice()));
        data.iter().fold(0, |sum: u64, number| sum.wrapping_mul(31).wrapping_add(u64::from(*number)))
    })
}

fn sort(data: &mut [u32]) {
    if data.len() <= 12 {
        insert(data);
        return;
    }
    let cut = partition(data);
    let (left, right) = data.split_at_mut(cut);
    sort(left);
    sort(right);
}

/// Where the slice is to be cut: nothing before is larger than anything behind.
fn partition(data: &mut [u32]) -> usize {
    let pivot = data[data.len() / 2 - 1];
    let (mut low, mut high) = (0, data.len() - 1);
    loop {
        while data[low] < pivot {
            low += 1;
        }
        while data[high] > pivot {
            high -= 1;
        }
        if low >= high {
            return high + 1;
        }
        data.swap(low, high);
        low += 1;
        high -= 1;
    }
}

fn insert(data: &mut [u32]) {
    for end in 1..data.len() {
        let number = data[end];
        let mut at = end;
        while at > 0 && data[at - 1] > number {
            data[at] = data[at - 1];
            at -= 1;
        }
        data[at] = number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sorts() {
        for (seed, len) in [(1, 0), (2, 1), (3, 12), (4, 13), (5, 1000), (6, LEN)] {
            let mut numbers = Numbers::new(seed);
            // Few values, so that many are equal.
            let mut data: Vec<u32> = (0..len).map(|_| (numbers.next() % 97) as u32).collect();
            let mut expected = data.clone();
            expected.sort_unstable();
            sort(&mut data);
            assert_eq!(data, expected);
        }
    }
}
