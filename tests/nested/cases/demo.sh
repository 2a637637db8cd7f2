# shellcheck shell=sh
# The built-in guest, eagerly and lazily: with hardware paging.
step demo snap demo
figures demo .
step create snap create demo.snap --memory 64M --work 16M
figures create 'demo.snap'
step verify snap verify demo.snap
step eager snap restore demo.snap --beats 5
figures eager 'beat 5|first'
step lazy snap restore --lazy demo.snap --beats 5
figures lazy 'beat 5|first'
holds lazy "no beat that is not ok" sh -c '! grep "^beat" lazy.out | grep -v "ok"'
step layer snap create layer.snap --parent demo.snap --when 'output:beat 5'
step whole snap flatten layer.snap -o whole.snap
step lazy-layer snap restore --lazy layer.snap --beats 3
figures lazy-layer 'beat|first'
