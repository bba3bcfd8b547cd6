//! Decimal text -> what Kafka Connect's `Decimal` holds: an unscaled integer in big-endian two's
//! complement, and how many of its digits are a fraction.

/// A decimal number, taken apart.
pub(super) struct Decimal {
    negative: bool,
    /// The digits without sign and point; at least one.
    digits: Vec<u8>,
    /// How many of them are behind the point; below zero: how many zeros are cut off.
    pub(super) scale: i32,
}

impl Decimal {
    /// `-123.450`; `None` for `NaN`, `Infinity` and whatever is no decimal number.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let (negative, text) = match text.strip_prefix(b"-") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let point = text.iter().position(|&byte| byte == b'.').unwrap_or(text.len());
        let (whole, fraction) = text.split_at_checked(point)?;
        let fraction = fraction.get(1..).unwrap_or_default();
        let digits = [whole, fraction].concat();
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        Some(Self { negative, digits, scale: i32::try_from(fraction.len()).ok()? })
    }

    /// Without the zeros at the end of its fraction.
    pub(super) fn shorten(&mut self) {
        while self.scale > 0 && self.digits.last() == Some(&b'0') {
            self.digits.pop();
            self.scale -= 1;
        }
        if self.digits.is_empty() {
            self.digits.push(b'0');
        }
    }

    /// With exactly this scale; `None` where digits other than zero would be lost.
    pub(super) fn rescale(&mut self, scale: i32) -> Option<()> {
        while self.scale < scale {
            self.digits.push(b'0');
            self.scale += 1;
        }
        while self.scale > scale {
            match self.digits.pop() {
                None | Some(b'0') => self.scale -= 1,
                Some(_) => return None,
            }
        }
        Some(())
    }

    /// The unscaled integer in as few bytes of two's complement as hold it.
    pub(super) fn unscaled(&self) -> Vec<u8> {
        let small = || std::str::from_utf8(&self.digits).ok()?.parse::<i128>().ok();
        let mut bytes = match self.digits.len() {
            0 => vec![0],
            1..=38 => small().unwrap_or_default().to_be_bytes().to_vec(),
            _ => self.magnitude(),
        };
        if self.negative {
            negate(&mut bytes);
        }
        let sign = if bytes.first().is_some_and(|byte| byte & 0x80 != 0) { 0xFF } else { 0 };
        let spare = bytes.windows(2).take_while(|pair| match pair {
            [first, next] => *first == sign && (next ^ sign) & 0x80 == 0,
            _ => false,
        });
        let spare = spare.count();
        bytes.drain(..spare);
        bytes
    }

    /// The digits as an integer, with a zero byte before it for the sign.
    fn magnitude(&self) -> Vec<u8> {
        let mut limbs: Vec<u64> = Vec::new();
        for chunk in self.digits.chunks(18) {
            let (mut carry, mut factor) = (0_u64, 1_u64);
            for digit in chunk {
                carry = carry * 10 + u64::from(digit - b'0');
                factor *= 10;
            }
            for limb in &mut limbs {
                let product = u128::from(*limb) * u128::from(factor) + u128::from(carry);
                let [low, high] = halves(product);
                *limb = low;
                carry = high;
            }
            if carry > 0 {
                limbs.push(carry);
            }
        }
        let big_endian = limbs.iter().rev().flat_map(|limb| limb.to_be_bytes());
        std::iter::once(0).chain(big_endian).collect()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn halves(product: u128) -> [u64; 2] {
    [product as u64, (product >> 64) as u64]
}

fn negate(bytes: &mut [u8]) {
    let mut carry = true;
    for byte in bytes.iter_mut().rev() {
        let (sum, over) = (!*byte).overflowing_add(carry.into());
        *byte = sum;
        carry = over;
    }
}

/// `$1,234.50`, `-$5.25` or `1.234,50 €` in hundredths.
pub(super) fn money(text: &str) -> Option<Decimal> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_digit).collect();
    if digits.is_empty() {
        return None;
    }
    let negative = text.contains(['-', '(']);
    let fraction = text
        .rfind(['.', ','])
        .and_then(|at| text.get(at + 1..))
        .map(|rest| rest.bytes().take_while(u8::is_ascii_digit).count());
    let mut number = Decimal { negative, digits, scale: if fraction == Some(2) { 2 } else { 0 } };
    number.rescale(2)?;
    Some(number)
}
