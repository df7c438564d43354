//! The floor's policy, as the floor key and the product in CONFIG determine it.

use std::path::Path;

use uuid::Uuid;

use super::digests::Policy;
use super::error::FloorError;
use crate::trust::config::{FLOOR_KEY_FILE, PRODUCT_FILE, find_floor_key, find_product};
use crate::trust::p256::P256PublicKey;

/// Returns the policy of the floor key and the product in CONFIG.
///
/// # Errors
/// [`FloorError::NotConfigured`] if CONFIG lacks one of them; [`FloorError::Config`].
pub fn policy(config: &Path) -> Result<Policy, FloorError> {
    policy_of(config, find_floor_key(config)?, find_product(config)?)
}

/// Does the same; returns `None` if CONFIG lacks the floor key or the product.
///
/// # Errors
/// [`FloorError::Config`].
pub fn find_policy(config: &Path) -> Result<Option<Policy>, FloorError> {
    match policy(config) {
        Err(FloorError::NotConfigured { .. }) => Ok(None),
        found => found.map(Some),
    }
}

/// Returns the policy of a floor key and a product that CONFIG has, or will have.
///
/// # Errors
/// [`FloorError::NotConfigured`] if there is none.
pub fn policy_of(
    config: &Path,
    key: Option<P256PublicKey>,
    product: Option<Uuid>,
) -> Result<Policy, FloorError> {
    let missing = |file, what| FloorError::NotConfigured { path: config.join(file), what };
    let key = key.ok_or_else(|| missing(FLOOR_KEY_FILE, "floor key"))?;
    let product = product.ok_or_else(|| missing(PRODUCT_FILE, "product"))?;
    Ok(Policy::new(key, product))
}
