from stages.training.timetable import Phase, Timetable


def test_phases_follow_one_another_and_each_has_its_reports():
    timetable = Timetable.of([64, 80], batch=8, points=4)
    assert timetable.phases == (Phase(0, 8), Phase(8, 18))
    assert timetable.end == 18
    assert timetable.reports == {2, 4, 6, 8, 11, 13, 16, 18}
    assert timetable.longest_interval == 3
    assert [timetable.phase_of(step).end for step in (1, 8, 9, 18)] == [8, 8, 18, 18]


def test_a_batch_that_is_not_full_is_a_step_and_more_reports_than_steps_are_one_for_each():
    timetable = Timetable.of([33], batch=8, points=100)
    assert timetable.phases == (Phase(0, 5),)
    assert timetable.reports == {1, 2, 3, 4, 5}
    assert timetable.longest_interval == 1
