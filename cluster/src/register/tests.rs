//! Dialogues with the two machines of the register.

use super::world::{Change, Plain, Value, What};
use super::*;
use crate::ids::Now;

type Out = Vec<Output<()>>;

const PATIENCE: u64 = 3_000;

fn at(mono: u64) -> Now {
    Now { mono, wall: 0 }
}

fn ballot(counter: u64, node: u16) -> Ballot {
    Ballot { counter, node: NodeNo(node), life: 1 }
}

fn proposer(node: u16, known: &Value) -> Proposer<Plain> {
    let mut proposer = Proposer::new(Plain, NodeNo(node), 1, 42, None);
    proposer.learn(&known.encode());
    proposer
}

fn touch(tag: u64) -> Change {
    Change { tag, what: What::Touch }
}

/// Who is sent a message, in order; the messages must be alike.
fn asked(out: &Out) -> Vec<u16> {
    let sent = out.iter().filter_map(|output| match output {
        Output::Send { to, .. } => Some(to.0),
        _ => None,
    });
    sent.collect()
}

fn outcome(out: &Out) -> Option<&Outcome<()>> {
    out.iter().find_map(|output| match output {
        Output::Done(outcome) => Some(outcome),
        _ => None,
    })
}

fn ballot_sent(out: &Out) -> Ballot {
    let sent = out.iter().find_map(|output| match output {
        Output::Send { message: RegisterMessage::Prepare { ballot }, .. } => Some(*ballot),
        _ => None,
    });
    sent.expect("a prepare was sent")
}

fn accept_sent(out: &Out) -> Value {
    let sent = out.iter().find_map(|output| match output {
        Output::Send { message: RegisterMessage::Accept { value, .. }, .. } => Value::decode(value),
        _ => None,
    });
    sent.expect("an accept was sent")
}

fn promise(ballot: Ballot, accepted: Option<(Ballot, &Value)>) -> RegisterMessage {
    RegisterMessage::Promise { ballot, accepted: accepted.map(|(at, value)| (at, value.encode())) }
}

/// Carries every message over at once until all is quiet; gives the outcomes, and the values learned.
fn settle(voters: &mut [Acceptor], proposer: &mut Proposer<Plain>, mut out: Out) -> Option<Outcome<()>> {
    let mut done = None;
    while !out.is_empty() {
        let mut answers = Vec::new();
        for output in out {
            match output {
                Output::Send { to, message } => {
                    let answer = voters[usize::from(to.0)].on_message(message).expect("a question");
                    proposer.on_message(at(1), to, answer.reply, &mut answers);
                }
                Output::Learned(_) => {}
                Output::Done(outcome) => done = Some(outcome),
            }
        }
        out = answers;
    }
    done
}

fn change(voters: &mut [Acceptor], proposer: &mut Proposer<Plain>, tag: u64, what: What) -> Value {
    let mut out = Vec::new();
    proposer.propose(at(0), Change { tag, what }, PATIENCE, &mut out).expect("not busy");
    match settle(voters, proposer, out) {
        Some(Outcome::Chosen(value)) => Value::decode(&value).expect("a value"),
        other => panic!("{other:?}"),
    }
}

fn voters() -> Vec<Acceptor> {
    (0..8).map(|_| Acceptor::default()).collect()
}

#[test]
fn a_voter_keeps_its_promise_and_says_when_to_write() {
    let mut voter = Acceptor::default();
    assert!(voter.on_prepare(ballot(5, 1)).persist);
    assert!(!voter.on_prepare(ballot(5, 1)).persist, "a doubled question is answered again");
    let refused =
        Answer { reply: RegisterMessage::Refused { ballot: ballot(4, 2), promised: ballot(5, 1) }, persist: false };
    assert_eq!(voter.on_prepare(ballot(4, 2)), refused);
    assert_eq!(voter.on_accept(ballot(4, 2), vec![1]), refused);
    assert!(voter.on_accept(ballot(5, 1), vec![2]).persist);
    assert!(matches!(voter.on_accept(ballot(5, 1), vec![3]).reply, RegisterMessage::Refused { .. }), "another value");
    let accepted = Answer { reply: RegisterMessage::Accepted { ballot: ballot(5, 1) }, persist: false };
    assert_eq!(voter.on_accept(ballot(5, 1), vec![2]), accepted, "said again");

    let state = slots::decode_state(&voter.encode_state()).expect("its own bytes");
    let mut voter = Acceptor::new(state);
    let shown = RegisterMessage::Promise { ballot: ballot(6, 2), accepted: Some((ballot(5, 1), vec![2])) };
    assert_eq!(voter.on_prepare(ballot(6, 2)).reply, shown, "after a restart it shows what it has accepted");
}

#[test]
fn a_change_takes_two_round_trips() {
    let value = Value::first(&[1, 2, 3]);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    assert_eq!(asked(&out), [1, 2, 3]);
    assert_eq!(one.propose(at(0), touch(8), PATIENCE, &mut Vec::new()), Err(Busy));
    let mine = ballot_sent(&out);
    out.clear();
    one.on_message(at(2), NodeNo(1), promise(mine, Some((ballot(0, 9), &value))), &mut out);
    one.on_message(at(2), NodeNo(1), promise(mine, Some((ballot(0, 9), &value))), &mut out);
    assert!(out.is_empty(), "a doubled promise counts once");
    one.on_message(at(3), NodeNo(3), promise(mine, Some((ballot(0, 9), &value))), &mut out);
    assert_eq!((asked(&out), accept_sent(&out).tag), (vec![1, 2, 3], 7));
    out.clear();
    one.on_message(at(4), NodeNo(2), RegisterMessage::Accepted { ballot: mine }, &mut out);
    assert!(out.is_empty());
    one.on_message(at(4), NodeNo(3), RegisterMessage::Accepted { ballot: mine }, &mut out);
    assert!(matches!(out[..], [Output::Learned(_), Output::Done(Outcome::Chosen(_))]));
    assert_eq!(one.next_deadline(), None);
}

#[test]
fn what_only_one_voter_has_accepted_is_made_chosen_before_it_is_built_upon() {
    let (value, mut later) = (Value::first(&[1, 2, 3]), Value::first(&[1, 2, 3]));
    (later.epoch, later.tag) = (2, 5);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    out.clear();
    one.on_message(at(1), NodeNo(1), promise(mine, Some((ballot(0, 3), &value))), &mut out);
    one.on_message(at(1), NodeNo(2), promise(mine, Some((ballot(0, 4), &later))), &mut out);
    assert_eq!(accept_sent(&out), later, "as it is");
    out.clear();
    one.on_message(at(2), NodeNo(1), RegisterMessage::Accepted { ballot: mine }, &mut out);
    one.on_message(at(2), NodeNo(2), RegisterMessage::Accepted { ballot: mine }, &mut out);
    assert_eq!(out[0], Output::Learned(later.encode()));
    assert!(ballot_sent(&out) > mine, "the change itself is another attempt");
}

/// A proposer stood still with its promises. Meanwhile another one read the register, and went on from what it found.
#[test]
fn what_was_proposed_before_a_read_is_overruled_by_it() {
    let (value, mut voters) = (Value::first(&[1, 2, 3]), voters());
    let mut founder = Proposer::new(Plain, NodeNo(1), 1, 42, None);
    let mut out = Vec::new();
    founder.create(at(0), value.encode(), PATIENCE, &mut out).expect("not busy");
    assert!(matches!(settle(&mut voters, &mut founder, out), Some(Outcome::Chosen(_))));
    let (mut late, mut reader) = (proposer(2, &value), proposer(3, &value));
    let highest = |proposer: &mut Proposer<Plain>, counter| {
        let told = RegisterMessage::Refused { ballot: ballot(0, 9), promised: ballot(counter, 9) };
        proposer.on_message(at(0), NodeNo(1), told, &mut Vec::new());
    };
    let mut out = Vec::new();
    late.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    highest(&mut late, 10);
    late.on_deadline(at(late.next_deadline().expect("under way")), &mut out);
    let mine = ballot_sent(&out.split_off(3));
    assert!(voters.iter_mut().skip(1).take(3).all(|voter| voter.on_prepare(mine).persist));

    // Voter 2 does not hear of the read.
    highest(&mut reader, 20);
    let mut out = Vec::new();
    reader.read(at(0), PATIENCE, &mut out).expect("not busy");
    out.retain(|output| !matches!(output, Output::Send { to: NodeNo(2), .. }));
    let mut done = None;
    while done.is_none() {
        let mut answers = Vec::new();
        for output in out.drain(..) {
            match output {
                Output::Send { to: NodeNo(2), .. } => {}
                Output::Send { to, message } => {
                    let answer = voters[usize::from(to.0)].on_message(message).expect("a question");
                    reader.on_message(at(1), to, answer.reply, &mut answers);
                }
                Output::Learned(_) => {}
                Output::Done(outcome) => done = Some(outcome),
            }
        }
        if answers.is_empty() && done.is_none() {
            reader.on_deadline(at(reader.next_deadline().expect("under way")), &mut answers);
        }
        out = answers;
    }
    assert_eq!(done, Some(Outcome::Chosen(value.encode())));

    let mut next = value.clone();
    (next.epoch, next.tag) = (2, 7);
    assert!(voters[2].on_accept(mine, next.encode()).persist, "the one voter that has not heard of it");
    let mut out = Vec::new();
    late.on_deadline(at(PATIENCE), &mut Vec::new());
    highest(&mut late, 30);
    late.read(at(PATIENCE), PATIENCE, &mut out).expect("not busy");
    let mut done = settle(&mut voters, &mut late, out);
    while done.is_none() {
        let mut out = Vec::new();
        late.on_deadline(at(late.next_deadline().expect("under way")), &mut out);
        done = settle(&mut voters, &mut late, out);
    }
    assert_eq!(done, Some(Outcome::Chosen(value.encode())), "nobody brings it back");
}

#[test]
fn promises_that_come_after_the_time_of_an_operation_do_not_count() {
    let value = Value::first(&[1]);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    out.clear();
    one.on_message(at(60_000), NodeNo(1), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    assert_eq!(out, [Output::Done(Outcome::Unavailable)]);
}

#[test]
fn a_refused_proposer_comes_back_with_a_higher_ballot_after_a_short_pause() {
    let mut one = proposer(1, &Value::first(&[1, 2, 3]));
    let mut out = Vec::new();
    one.propose(at(100), touch(7), PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    out.clear();
    let refusal = RegisterMessage::Refused { ballot: mine, promised: ballot(40, 2) };
    one.on_message(at(101), NodeNo(2), refusal.clone(), &mut out);
    assert_eq!(one.next_deadline(), Some(600), "two of three may still promise");
    one.on_message(at(102), NodeNo(3), refusal, &mut out);
    let again = one.next_deadline().expect("a pause");
    assert!((107..=152).contains(&again) && out.is_empty());
    one.on_deadline(at(again), &mut out);
    assert_eq!(ballot_sent(&out).counter, 41);
}

#[test]
fn silence_is_unavailable_before_an_accept_and_unknown_after_it() {
    let value = Value::first(&[1]);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    one.on_deadline(at(PATIENCE), &mut out);
    assert_eq!(outcome(&out), Some(&Outcome::Unavailable));

    out.clear();
    one.propose(at(0), touch(8), PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    one.on_message(at(1), NodeNo(1), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    one.on_deadline(at(PATIENCE), &mut out);
    assert_eq!(outcome(&out), Some(&Outcome::Unknown));
}

#[test]
fn an_accept_without_an_answer_is_looked_up_and_not_applied_again() {
    let value = Value::first(&[1]);
    let (mut voters, mut one) = (voters(), proposer(1, &value));
    let mut out = Vec::new();
    let mut founder = Proposer::new(Plain, NodeNo(1), 1, 42, None);
    founder.create(at(0), value.encode(), PATIENCE, &mut out).expect("not busy");
    assert!(matches!(settle(&mut voters, &mut founder, out), Some(Outcome::Chosen(_))));

    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    // Refused: the founder has used this counter. Then promised, then accepted with the answer lost.
    while !out.iter().any(|o| matches!(o, Output::Send { message: RegisterMessage::Accept { .. }, .. })) {
        let mut answers = Vec::new();
        for output in out.drain(..) {
            if let Output::Send { to, message } = output {
                let answer = voters[usize::from(to.0)].on_message(message).expect("a question");
                one.on_message(at(1), to, answer.reply, &mut answers);
            }
        }
        if answers.is_empty() {
            one.on_deadline(at(one.next_deadline().expect("under way")), &mut answers);
        }
        out = answers;
    }
    for output in out.drain(..) {
        if let Output::Send { to, message } = output {
            let _lost = voters[usize::from(to.0)].on_message(message);
        }
    }
    one.on_deadline(at(one.next_deadline().expect("under way")), &mut out);
    let Some(Outcome::Chosen(found)) = settle(&mut voters, &mut one, out) else { panic!("it was chosen") };
    let found = Value::decode(&found).expect("a value");
    assert_eq!((found.epoch, found.tag), (2, 7));
}

#[test]
fn voters_grow_are_replaced_and_shrink() {
    let mut voters = voters();
    let mut one = Proposer::new(Plain, NodeNo(1), 1, 42, None);
    let mut out = Vec::new();
    one.create(at(0), Value::first(&[1]).encode(), PATIENCE, &mut out).expect("not busy");
    assert!(matches!(settle(&mut voters, &mut one, out), Some(Outcome::Chosen(_))));
    let sets: [&[u16]; 5] = [&[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 6, 4, 5], &[1, 4, 5], &[5]];
    for (tag, set) in (1..).step_by(2).zip(sets) {
        change(&mut voters, &mut one, tag, What::Voters(set.to_vec()));
        let done = change(&mut voters, &mut one, tag + 1, What::VotersDone);
        let now: Vec<u16> = done.config.voters.iter().map(|node| node.0).collect();
        assert_eq!((now.as_slice(), done.config.next.len()), (set, 0));
    }

    // Who knows nothing but an old value is led along the chain to the only voter left.
    let mut stale = Proposer::new(Plain, NodeNo(2), 1, 43, Some(&Value::first(&[1]).encode()));
    let mut out = Vec::new();
    stale.read(at(0), PATIENCE, &mut out).expect("not busy");
    let mut done = settle(&mut voters, &mut stale, out);
    for _ in 0..10 {
        if done.is_none() {
            let mut out = Vec::new();
            stale.on_deadline(at(stale.next_deadline().expect("under way")), &mut out);
            done = settle(&mut voters, &mut stale, out);
        }
    }
    let Some(Outcome::Chosen(value)) = done else { panic!("{done:?}") };
    assert_eq!(Value::decode(&value).map(|value| value.epoch), Some(11));
}

#[test]
fn while_voters_change_both_groups_must_agree() {
    let mut value = Value::first(&[1, 2, 3]);
    value.config.next = [3, 4, 5].map(NodeNo).to_vec();
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.propose(at(0), touch(7), PATIENCE, &mut out).expect("not busy");
    assert_eq!(asked(&out), [1, 2, 3, 4, 5]);
    let mine = ballot_sent(&out);
    out.clear();
    for node in [1, 2, 3] {
        one.on_message(at(1), NodeNo(node), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    }
    assert!(out.is_empty(), "three of five, but one of the next group");
    one.on_message(at(1), NodeNo(5), promise(mine, None), &mut out);
    assert_eq!(accept_sent(&out).tag, 7);
}

/// Else a value could be left with one voter, neither chosen nor given up, when those who were to vote are gone already.
#[test]
fn who_is_to_vote_promises_and_accepts_before_the_others() {
    let value = Value::first(&[1, 2, 3]);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    let next = [3, 4, 5].map(NodeNo);
    one.propose(at(0), Change { tag: 7, what: What::Voters(vec![3, 4, 5]) }, PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    out.clear();
    for node in [1, 2] {
        one.on_message(at(1), NodeNo(node), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    }
    assert_eq!((asked(&out), ballot_sent(&out)), (vec![4, 5], mine), "those who were not asked yet");
    out.clear();
    one.on_message(at(1), NodeNo(3), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    assert!(out.is_empty(), "one of three");
    // It voted long ago, and what it holds from then is not looked at.
    let mut old = value.clone();
    old.tag = 99;
    one.on_message(at(1), NodeNo(4), promise(mine, Some((ballot(0, 2), &old))), &mut out);
    assert_eq!((asked(&out), accept_sent(&out).config.next), (vec![3, 4, 5], next.to_vec()));
    out.clear();
    let accepted = RegisterMessage::Accepted { ballot: mine };
    one.on_message(at(1), NodeNo(4), accepted.clone(), &mut out);
    assert!(out.is_empty(), "one of three");
    one.on_message(at(1), NodeNo(3), accepted.clone(), &mut out);
    assert_eq!((asked(&out), outcome(&out)), (vec![1, 2], None), "the others are asked now");
    out.clear();
    one.on_message(at(1), NodeNo(5), accepted.clone(), &mut out);
    assert!(out.is_empty(), "nobody is asked twice, and one of the present voters has accepted");
    one.on_message(at(1), NodeNo(1), accepted, &mut out);
    assert!(matches!(outcome(&out), Some(Outcome::Chosen(_))));

    // When they do not answer nothing has changed.
    let mut one = proposer(1, &value);
    out.clear();
    one.propose(at(0), Change { tag: 7, what: What::Voters(vec![3, 4, 5]) }, PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    for node in [1, 2, 3] {
        one.on_message(at(1), NodeNo(node), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    }
    one.on_deadline(at(PATIENCE), &mut out);
    assert_eq!(outcome(&out), Some(&Outcome::Unavailable));
}

#[test]
fn voters_without_a_common_group_may_not_follow() {
    let mut voters = voters();
    let mut one = Proposer::new(Plain, NodeNo(1), 1, 42, None);
    let mut out = Vec::new();
    one.create(at(0), Value::first(&[1]).encode(), PATIENCE, &mut out).expect("not busy");
    settle(&mut voters, &mut one, out);
    let mut out = Vec::new();
    one.propose(at(0), Change { tag: 1, what: What::Seize(2) }, PATIENCE, &mut out).expect("not busy");
    assert_eq!(settle(&mut voters, &mut one, out), Some(Outcome::Illegal));

    let mut out = Vec::new();
    let mut again = Proposer::new(Plain, NodeNo(1), 2, 42, None);
    again.create(at(0), Value::first(&[1]).encode(), PATIENCE, &mut out).expect("not busy");
    let mut done = settle(&mut voters, &mut again, out);
    while done.is_none() {
        let mut out = Vec::new();
        again.on_deadline(at(again.next_deadline().expect("under way")), &mut out);
        done = settle(&mut voters, &mut again, out);
    }
    assert!(matches!(done, Some(Outcome::Exists(_))), "a register is created once");
}

#[test]
fn lives_and_nodes_never_make_the_same_ballot() {
    let value = Value::first(&[1]);
    let first = |node, life| {
        let mut out = Vec::new();
        let mut proposer = Proposer::new(Plain, NodeNo(node), life, 42, Some(&value.encode()));
        proposer.read(at(0), PATIENCE, &mut out).expect("not busy");
        ballot_sent(&out)
    };
    assert_ne!(first(1, 1), first(1, 2));
    assert_ne!(first(1, 1), first(2, 1));
}

#[test]
fn garbage_from_a_voter_does_not_count() {
    let value = Value::first(&[1, 2, 3]);
    let mut one = proposer(1, &value);
    let mut out = Vec::new();
    one.read(at(0), PATIENCE, &mut out).expect("not busy");
    let mine = ballot_sent(&out);
    out.clear();
    let garbage = RegisterMessage::Promise { ballot: mine, accepted: Some((ballot(0, 1), vec![9; 3])) };
    one.on_message(at(1), NodeNo(1), garbage, &mut out);
    one.on_message(at(1), NodeNo(9), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    one.on_message(at(1), NodeNo(2), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    assert!(out.is_empty(), "one sent garbage, one was not asked");
    one.on_message(at(1), NodeNo(3), promise(mine, Some((ballot(0, 1), &value))), &mut out);
    assert_eq!(accept_sent(&out), value, "a read writes what it found");
}
