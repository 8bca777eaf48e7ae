//! What a tenant is not told: reasons name other jobs, and other tenants' jobs do not exist for it.

use std::collections::HashMap;

use lathe_api::job::Job;

use super::extract::User;
use crate::coordinator::Coordinator;
use crate::store::StoreError;
use crate::submit;

/// In place of another tenant's job.
const SOMEBODYS: &str = "of another tenant";

/// Which jobs, of those that were looked up, are somebody else's.
#[derive(Debug, Default)]
pub struct Hidden(HashMap<String, bool>);

impl Hidden {
    /// Looks up the jobs that these texts name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn of(
        &mut self,
        coordinator: &Coordinator,
        user: &User,
        texts: impl IntoIterator<Item = &str>,
    ) -> Result<(), StoreError> {
        if user.is_admin() {
            return Ok(());
        }
        for text in texts {
            for word in words(text).filter(|word| is_job_id(word)) {
                if self.0.contains_key(word) {
                    continue;
                }
                let record = submit::find_job(coordinator, word).await?;
                let hidden = record.is_some_and(|record| !user.may(&record.value.job.tenant));
                self.0.insert(word.to_owned(), hidden);
            }
        }
        Ok(())
    }

    /// The text without the jobs that are hidden.
    pub fn text(&self, text: &str) -> String {
        let mut shown = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(start) = rest.find(is_id_char) {
            let end = rest[start..].find(|c| !is_id_char(c)).map_or(rest.len(), |length| start + length);
            let (before, word) = (&rest[..start], &rest[start..end]);
            shown.push_str(before);
            shown.push_str(if self.is_hidden(word) { SOMEBODYS } else { word });
            rest = &rest[end..];
        }
        shown.push_str(rest);
        shown
    }

    /// The job, unless it is hidden.
    pub fn job(&self, id: Option<String>) -> Option<String> {
        id.filter(|id| !self.is_hidden(id))
    }

    fn is_hidden(&self, word: &str) -> bool {
        self.0.get(word).copied().unwrap_or(false)
    }
}

/// A job's texts, without others' jobs.
///
/// # Errors
/// When the store fails.
pub async fn job(
    coordinator: &Coordinator,
    user: &User,
    hidden: &mut Hidden,
    job: &mut Job,
) -> Result<(), StoreError> {
    let texts = [&job.reason, &job.why, &job.after];
    hidden.of(coordinator, user, texts.into_iter().flatten().map(String::as_str)).await?;
    for text in [&mut job.reason, &mut job.why].into_iter().flatten() {
        *text = hidden.text(text);
    }
    job.after = hidden.job(job.after.take());
    Ok(())
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c| !is_id_char(c)).filter(|word| !word.is_empty())
}

fn is_id_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
}

/// `<name>-<6 hexadecimal digits>`.
fn is_job_id(word: &str) -> bool {
    let suffix = word.rsplit_once('-').filter(|(name, _)| !name.is_empty()).map(|(_, suffix)| suffix);
    suffix.is_some_and(|suffix| suffix.len() == 6 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_jobs_are_taken_out_of_a_text() {
        let hidden =
            Hidden(HashMap::from([("fit-ab12cd".to_owned(), true), ("own-ab12cd".to_owned(), false)]));
        let text = "gets the room of jobs fit-ab12cd, own-ab12cd on n-ab12cd; é: 3 GPUs";
        assert_eq!(
            hidden.text(text),
            "gets the room of jobs of another tenant, own-ab12cd on n-ab12cd; é: 3 GPUs"
        );
        assert_eq!(hidden.job(Some("fit-ab12cd".to_owned())), None);
        assert_eq!(hidden.job(Some("own-ab12cd".to_owned())).as_deref(), Some("own-ab12cd"));
        assert_eq!(hidden.text(""), "");
    }

    #[test]
    fn words_that_may_be_jobs_are_recognised() {
        let found: Vec<_> = words("job my-job-ab12cd, (a-000000) -ab12cd x-ab12c x-ab12cg").collect();
        let ids: Vec<_> = found.into_iter().filter(|word| is_job_id(word)).collect();
        assert_eq!(ids, ["my-job-ab12cd", "a-000000"]);
    }
}
