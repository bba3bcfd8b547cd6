import java.io.PrintStream;
import java.time.Duration;
import java.time.Instant;
import java.util.List;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.ConsumerRecords;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.StringDeserializer;

/** Prints when each row of `tick` was written and when a read_committed consumer had it. */
class Arrivals {
    private static final String AT = "\"at\":";

    public static void main(String[] arguments) {
        Properties settings = new Properties();
        settings.put("bootstrap.servers", arguments[0]);
        settings.put("isolation.level", "read_committed");
        settings.put("max.poll.records", "10000");
        settings.put("key.deserializer", StringDeserializer.class.getName());
        settings.put("value.deserializer", StringDeserializer.class.getName());
        PrintStream out = new PrintStream(System.out, false);
        try (KafkaConsumer<String, String> consumer = new KafkaConsumer<>(settings)) {
            TopicPartition all = new TopicPartition(arguments[1], 0);
            consumer.assign(List.of(all));
            consumer.seekToBeginning(List.of(all));
            while (!out.checkError()) {
                ConsumerRecords<String, String> records = consumer.poll(Duration.ofMillis(200));
                Instant now = Instant.now();
                long arrived = now.getEpochSecond() * 1_000_000 + now.getNano() / 1_000;
                for (ConsumerRecord<String, String> record : records) {
                    out.println(at(record.value()) + " " + arrived);
                }
                out.flush();
            }
        }
    }

    private static String at(String message) {
        int begin = message.indexOf(AT) + AT.length();
        int end = begin;
        while (Character.isDigit(message.charAt(end))) {
            end++;
        }
        return message.substring(begin, end);
    }
}
