//! Each of the models as the code is, which must hold, and with a defect, which must be found.

use ringleader_model::models;
use ringleader_model::peers::{self, Caller};
use ringleader_model::sync::{Defect, check};

#[test]
fn no_wake_is_lost_and_no_sleep_is_signalled_twice() {
    check(Defect::None, models::two_wake_an_executor_that_falls_asleep);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_is_lost_if_nothing_is_ordered() {
    check(Defect::Unordered, models::two_wake_an_executor_that_falls_asleep);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_is_lost_if_looking_and_falling_asleep_are_two_steps() {
    check(Defect::TwoSteps, models::two_wake_an_executor_that_falls_asleep);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_is_lost_if_who_finds_it_announced_has_no_fence() {
    check(Defect::Unfenced, models::two_wake_an_executor_that_falls_asleep);
}

#[test]
fn what_comes_during_one_sleep_is_signalled_once() {
    check(Defect::None, models::two_post_to_an_executor_that_sleeps);
}

#[test]
#[should_panic(expected = "one signal for all that is there")]
fn it_is_signalled_twice_if_looking_and_announcing_are_two_steps() {
    check(Defect::TwoSteps, models::two_post_to_an_executor_that_sleeps);
}

#[test]
fn a_full_inbox_refuses_and_no_other_does() {
    check(Defect::None, models::more_is_posted_than_there_is_room_for);
}

#[test]
fn a_job_posted_to_an_inbox_that_closes_has_one_fate() {
    check(Defect::None, || models::a_job_is_posted_while_the_inbox_is_closed(true));
}

#[test]
#[should_panic(expected = "run, thrown away or refused")]
fn it_has_none_if_the_poster_does_not_look_again() {
    check(Defect::None, || models::a_job_is_posted_while_the_inbox_is_closed(false));
}

#[test]
#[should_panic(expected = "run, thrown away or refused")]
fn it_has_none_if_nothing_is_ordered() {
    check(Defect::Unordered, || models::a_job_is_posted_while_the_inbox_is_closed(true));
}

#[test]
fn a_job_posted_to_an_inbox_that_two_close_has_one_fate() {
    check(Defect::None, models::a_job_is_posted_while_two_close_the_inbox);
}

#[test]
fn a_call_to_an_executor_that_ends_comes_to_the_right_outcome() {
    check(Defect::None, || peers::an_executor_is_called_and_ends(Caller::Peer));
    check(Defect::None, || peers::an_executor_is_called_and_ends(Caller::Stranger));
}

#[test]
fn an_answer_beside_the_end_of_a_hung_executor_is_one_outcome() {
    check(Defect::None, || peers::a_call_is_answered_while_its_executor_is_given_up(Caller::Peer));
    check(Defect::None, || peers::a_call_is_answered_while_its_executor_is_given_up(Caller::Stranger));
}

#[test]
fn a_call_begun_beside_the_end_of_its_executor_is_lost() {
    check(Defect::None, || peers::a_call_is_begun_while_its_executor_is_given_up(true));
}

#[test]
#[should_panic(expected = "deadlock")]
fn it_has_no_outcome_if_it_is_not_noted() {
    check(Defect::None, || peers::a_call_is_begun_while_its_executor_is_given_up(false));
}

#[test]
fn a_caller_that_goes_away_is_woken_once_or_not_at_all() {
    check(Defect::None, || peers::a_caller_goes_away_while_it_is_answered(Caller::Peer));
    check(Defect::None, || peers::a_caller_goes_away_while_it_is_answered(Caller::Stranger));
}

#[test]
fn no_executor_gets_up_unseen() {
    check(Defect::None, models::two_executors_get_up_while_the_supervisor_falls_asleep);
}

#[test]
#[should_panic(expected = "nobody looks, and nobody says so")]
fn one_gets_up_unseen_if_there_is_no_fence() {
    check(Defect::Unfenced, models::two_executors_get_up_while_the_supervisor_falls_asleep);
}
